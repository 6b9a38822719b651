// Methods that look at each element by itself: math/pointwise.h.
#pragma once

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
    switch (kOp) {
      case Pointwise::kNearswap:
        return nearswap_point(base, load, call);
      case Pointwise::kRam:
        return ram_point(base, load, call);
      case Pointwise::kMagmax:
        return magmax_point(base, load, call);
      case Pointwise::kConsensus:
        return consensus_point(base, load, call);
      case Pointwise::kTall:
        return tall_point(base, load, call);
      case Pointwise::kEmr:
        return emr_point(base, load, call);
      case Pointwise::kVariance:
        return variance_point(base, load, call);
      default:
        return sce_point(base, load, call);
    }
  }
};

}  // namespace cuda
}  // namespace pymerge
