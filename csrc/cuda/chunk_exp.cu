#include "cuda/kernels_sums.h"

namespace pymerge {
namespace cuda {

Kernel exp_kernel_of(Kind kind, int num_models) {
  return pick_pairs<ExpPairs, kUnrolledPoints>(kind, num_models);
}

}  // namespace cuda
}  // namespace pymerge
