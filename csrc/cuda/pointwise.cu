// Compiled once for each dtype: build.py defines PYMERGE_DTYPE, which is Bf16, F16 or F32.
#include "cuda/kernels_pointwise.h"

namespace pymerge {
namespace cuda {

template <class Io>
Kernel pointwise_of_dtype(int num_models, Pointwise op) {
  return pick_pointwise<Io, kUnrolledPoints>(num_models, op);
}

template Kernel pointwise_of_dtype<PYMERGE_DTYPE>(int, Pointwise);

}  // namespace cuda
}  // namespace pymerge
