#include "cuda/kernels_any.h"
#include "cuda/kernels_magnitude.h"

namespace pymerge {
namespace cuda {

Kernel any_weighted_sum(bool wide) {
  return wide ? any_weighted_sum_kernel<double> : any_weighted_sum_kernel<float>;
}

Kernel any_ties(bool wide) { return wide ? any_ties_kernel<double> : any_ties_kernel<float>; }

Kernel magnitudes(Dtype dtype, bool mixed) {
  if (dtype == Dtype::kF64) return magnitude_kernel<MixedKeys<double>>;
  if (mixed) return magnitude_kernel<MixedKeys<float>>;
  if (dtype == Dtype::kBF16) return magnitude_kernel<UniformKeys<Bf16>>;
  if (dtype == Dtype::kF16) return magnitude_kernel<UniformKeys<F16>>;
  return magnitude_kernel<UniformKeys<F32>>;
}

}  // namespace cuda
}  // namespace pymerge
