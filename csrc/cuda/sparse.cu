// Compiled once for each dtype: build.py defines PYMERGE_DTYPE, which is Bf16, F16 or F32.
#include "cuda/kernels_sparse.h"

namespace pymerge {
namespace cuda {

template <class Io>
Kernel sparse_of_dtype(int num_models, SparseForm form, bool elect) {
  return pick_sparse<Io, kUnrolledPoints>(num_models, form, elect);
}

template Kernel sparse_of_dtype<PYMERGE_DTYPE>(int, SparseForm, bool);

}  // namespace cuda
}  // namespace pymerge
