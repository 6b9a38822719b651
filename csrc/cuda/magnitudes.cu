#include "cuda/kernels_magnitude.h"

namespace pymerge {
namespace cuda {

Kernel magnitudes(Kind kind, Bins bins) {
  if (kind.mixed && kind.dtype == Dtype::kF64) return pick_magnitudes<MixedKeys<double>>(bins);
  if (kind.mixed) return pick_magnitudes<MixedKeys<float>>(bins);
  if (kind.dtype == Dtype::kBF16) return pick_magnitudes<UniformKeys<Bf16>>(bins);
  if (kind.dtype == Dtype::kF16) return pick_magnitudes<UniformKeys<F16>>(bins);
  return pick_magnitudes<UniformKeys<F32>>(bins);
}

}  // namespace cuda
}  // namespace pymerge
