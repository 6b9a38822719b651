// The kernels of all files of this folder, by what they are for.
#pragma once

#include <utility>

#include "cuda/table.h"

namespace pymerge {
namespace cuda {

// Kernels of one dtype are unrolled for up to so many models.
#if defined(PYMERGE_CUDA_UNROLLED)
constexpr int kUnrolledModels = PYMERGE_CUDA_UNROLLED;
#else
constexpr int kUnrolledModels = 16;
#endif
constexpr int kFloorStreams = kUnrolledModels + 1;
// Ops that are wanted for many models less often.
constexpr int kUnrolledPoints = 8;

// Which arithmetic a kernel has: ties_point_finite without weights, with weights, and with
// statistics of signs; or ties_point_careful for every dialect.
enum class TiesForm { kPlain, kWeighted, kSigns, kCareful };

// What decides which elements of sparse task vectors are kept.
enum class SparseForm { kBand, kDrawn, kBoth, kRanks };

Kernel floor_of_streams(int num_streams);

// Where the bins of a histogram are: none are wanted, in shared memory, or in device memory.
enum class Bins { kNone, kShared, kDevice };

// The operands of a call: all of one dtype, or any dtypes where `mixed`, computed in `dtype`: kF64
// or kF32.
struct Kind {
  Dtype dtype;
  bool mixed;
};

Kernel magnitudes(Kind kind, Bins bins);

// Of any number of models.
Kernel weighted_sum_kernel_of(Kind kind, int num_models, bool has_base);
Kernel ties_kernel_of(Kind kind, int num_models, TiesForm form);
Kernel sparse_kernel_of(Kind kind, int num_models, SparseForm form, bool elect);
Kernel pointwise_kernel_of(Kind kind, int num_models, Pointwise op);
Kernel row_sum_kernel_of(Kind kind);
Kernel divergence_kernel_of(Kind kind, Divergence divergence);
Kernel importance_kernel_of(Kind kind, bool merge);
Kernel sums_kernel_of(Kind kind, int num_models, SumsKind sums, bool ranks);
Kernel pcb_kernel_of(int num_models, int32_t variant, bool merge);
Kernel pcb_paper(int num_models, bool merge);

// Of one dtype: Bf16, F16 or F32. Large families are compiled once for each, all in parallel. Of
// weighted sums and TIES, num_models is in 1 .. kUnrolledModels.
template <class Io>
Kernel weighted_sum_of_dtype(int num_models, bool has_base);
template <class Io>
Kernel ties_of_dtype(int num_models, TiesForm form);
template <class Io>
Kernel sparse_of_dtype(int num_models, SparseForm form, bool elect);
template <class Io>
Kernel pointwise_of_dtype(int num_models, Pointwise op);

// Of one kind of sums. `ranks`: they decide what sparse keeps.
#define PM_SUMS(kind, name, rows, reals, inputs) \
  Kernel name##_sums(Kind kind, int num_models, bool ranks);
#include "sums.def"

// Picks from kernels that are templates over the number of models.
template <template <int> class Instance, int... K>
Kernel pick_instance(int number, std::integer_sequence<int, K...>) {
  static const Kernel all[] = {Instance<K + 1>::kernel()...};
  return all[number - 1];
}

}  // namespace cuda
}  // namespace pymerge
