#include "cuda/kernels_pointwise.h"

namespace pymerge {
namespace cuda {

Kernel pointwise_f32(int num_models, Pointwise op) {
  return pick_pointwise<F32, kUnrolledPoints>(num_models, op);
}

}  // namespace cuda
}  // namespace pymerge
