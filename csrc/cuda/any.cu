#include "cuda/kernels_any.h"

namespace pymerge {
namespace cuda {

Kernel any_weighted_sum(bool wide) {
  return wide ? any_weighted_sum_kernel<double> : any_weighted_sum_kernel<float>;
}

Kernel any_ties(bool wide) { return wide ? any_ties_kernel<double> : any_ties_kernel<float>; }

}  // namespace cuda
}  // namespace pymerge
