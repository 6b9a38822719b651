// Weighted sums of models (averaging, linear) and of task vectors (task arithmetic).
#pragma once

#include "math/value.h"

namespace pymerge {

// One term: sum + w * x, rounded after the product and after the sum.
template <class F>
PM_INLINE F weighted_sum_add(F sum, F x, F w) {
  return sum + w * x;
}

template <class F>
PM_INLINE F weighted_sum_finish(F sum, bool divide, F divisor) {
  return divide ? sum / divisor : sum;
}

// theta_0 + scale * (sum / divisor): Ilharco et al. 2023.
template <class F>
PM_INLINE F task_arithmetic_finish(F base, F sum, bool divide, F divisor, F scale) {
  if (divide) sum = sum / divisor;
  return base + scale * sum;
}

}  // namespace pymerge
