#include "cuda/kernels_sparse.h"

namespace pymerge {
namespace cuda {

Kernel sparse_f16(int num_models, SparseForm form, bool elect) {
  return pick_sparse<F16, kUnrolledPoints>(num_models, form, elect);
}

}  // namespace cuda
}  // namespace pymerge
