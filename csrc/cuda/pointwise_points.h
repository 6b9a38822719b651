// Methods that treat each element independently: math/pointwise.h.
#pragma once

#include "cuda/table.h"
#include "cuda/values.h"
#include "math/pointwise.h"

namespace pymerge {
namespace cuda {

template <Pointwise kOp>
struct PointwisePoint {
  using ModelType = Model;

  template <int K>
  static constexpr int64_t kNumbers = pointwise_reals(kOp, K);

  template <int K, class F, class Load>
  PM_DEVICE F get(F base, Load load, const Head&, const Model*, const F* numbers, int count,
                  int64_t, bool& finite) {
    const PointwiseCall<F> call{numbers, count};
    finite = finite & is_finite(base);
#pragma unroll
    for (int k = 0; k < (K > 0 ? K : count); ++k) finite = finite & is_finite(load(k));
#define PM_POINTWISE(kind, name, reals, models) \
  if constexpr (kOp == Pointwise::kind) return name##_point(base, load, call);
#include "pointwise.def"
  }
};

}  // namespace cuda
}  // namespace pymerge
