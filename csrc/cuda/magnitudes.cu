#include "cuda/kernels_magnitude.h"

namespace pymerge {
namespace cuda {

Kernel magnitudes(Dtype dtype, bool mixed, Bins bins) {
  if (dtype == Dtype::kF64) return pick_magnitudes<MixedKeys<double>>(bins);
  if (mixed) return pick_magnitudes<MixedKeys<float>>(bins);
  if (dtype == Dtype::kBF16) return pick_magnitudes<UniformKeys<Bf16>>(bins);
  if (dtype == Dtype::kF16) return pick_magnitudes<UniformKeys<F16>>(bins);
  return pick_magnitudes<UniformKeys<F32>>(bins);
}

}  // namespace cuda
}  // namespace pymerge
