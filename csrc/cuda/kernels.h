// The kernels of all files of this folder, grouped by op.
#pragma once

#include <utility>

#include "cuda/table.h"

namespace pymerge {
namespace cuda {

// The largest number of models that kernels of one dtype are unrolled for.
#if defined(PYMERGE_CUDA_UNROLLED)
constexpr int kUnrolledModels = PYMERGE_CUDA_UNROLLED;
#else
constexpr int kUnrolledModels = 16;
#endif
constexpr int kFloorStreams = kUnrolledModels + 1;
// The same for ops that rarely have many models.
constexpr int kUnrolledPoints = 8;

// The arithmetic of a kernel: ties_point_finite without weights, with weights, or with statistics
// of signs; or ties_point_careful for every dialect.
enum class TiesForm { kPlain, kWeighted, kSigns, kCareful };

// What decides which elements of sparse task vectors are kept.
enum class SparseForm { kBand, kDrawn, kBoth, kRanks };

Kernel floor_of_streams(int num_streams);

// Where a histogram's bins are: nowhere, in shared memory, or in device memory.
enum class Bins { kNone, kShared, kDevice };

// The operands of a call: all of one dtype, or, if `mixed`, of any dtypes and computed in `dtype`,
// which is kF64 or kF32.
struct Kind {
  Dtype dtype;
  bool mixed;
};

Kernel magnitudes(Kind kind, Bins bins);

// For any number of models.
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

// For one dtype: Bf16, F16 or F32. Large families are compiled once for each dtype, all in
// parallel. For weighted sums and TIES, num_models is in 1 .. kUnrolledModels.
template <class Io>
Kernel weighted_sum_of_dtype(int num_models, bool has_base);
template <class Io>
Kernel ties_of_dtype(int num_models, TiesForm form);
template <class Io>
Kernel sparse_of_dtype(int num_models, SparseForm form, bool elect);
template <class Io>
Kernel pointwise_of_dtype(int num_models, Pointwise op);

// For one kind of sums. `ranks`: whether ranks decide which elements of sparse task vectors are
// kept.
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
