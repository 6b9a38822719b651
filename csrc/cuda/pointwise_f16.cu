#include "cuda/kernels_pointwise.h"

namespace pymerge {
namespace cuda {

Kernel pointwise_f16(int num_models, Pointwise op) {
  return pick_pointwise<F16, kUnrolledPoints>(num_models, op);
}

}  // namespace cuda
}  // namespace pymerge
