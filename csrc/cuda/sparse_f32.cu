#include "cuda/kernels_sparse.h"

namespace pymerge {
namespace cuda {

Kernel sparse_f32(int num_models, SparseForm form, bool elect) {
  return pick_sparse<F32, kUnrolledPoints>(num_models, form, elect);
}

}  // namespace cuda
}  // namespace pymerge
