#include "cuda/kernels_pointwise.h"

namespace pymerge {
namespace cuda {

Kernel pointwise_bf16(int num_models, Pointwise op) {
  return pick_pointwise<Bf16, kUnrolledPoints>(num_models, op);
}

}  // namespace cuda
}  // namespace pymerge
