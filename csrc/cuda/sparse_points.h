// Merges of sparse task vectors on a GPU: the arithmetic of math/sparse.h, step by step. Whether an
// element is kept takes one comparison of unsigned integers. The terms of models beyond the
// unrolled ones are recomputed rather than stored.
#pragma once

#include "cuda/table.h"
#include "cuda/values.h"
#include "math/sparse.h"
#include "math/ties.h"

namespace pymerge {
namespace cuda {

// lo <= key <= lo + span; nothing where lo is above every key.
template <class F>
PM_DEVICE bool in_band(typename Traits<F>::Bits key, const SparseModel& model) {
  if constexpr (sizeof(F) == 8) {
    return static_cast<uint64_t>(key) - static_cast<uint64_t>(model.threshold) <= model.span;
  } else {
    return static_cast<uint32_t>(key) - static_cast<uint32_t>(model.threshold) <=
           static_cast<uint32_t>(model.span);
  }
}

// `mixed` is the mixed low half of the element's flat index: see mask_mix in math/sparse.h.
//
// An element is kept by bands of keys, hashes of indices, both, or ranks.
template <bool kBand, bool kDrawn>
struct KeptByKey {
  using ModelType = SparseModel;

  template <class F>
  PM_DEVICE F keep(F delta, const Head&, const SparseModel& model, uint32_t mixed, int64_t) {
    bool kept = true;
    if (kBand) kept = in_band<F>(magnitude_key(delta), model);
    if (kDrawn) kept = kept & (mask_hash_of(mixed, model.first, model.slope) <= model.limit);
    return kept ? delta : F{};
  }
};

struct KeptByRank {
  using ModelType = RankedModel;

  template <class F>
  PM_DEVICE F keep(F delta, const Head& head, const RankedModel& model, uint32_t mixed,
                   int64_t at) {
    const int32_t rank = model.ranks[at];
    if ((head.flags & kChances) == 0) {
      return in_band<F>(static_cast<typename Traits<F>::Bits>(rank), model) ? delta : F{};
    }
    const uint32_t hash = mask_hash_of(mixed, model.first, model.slope);
    const F drawn = static_cast<F>(static_cast<int32_t>(hash >> 8)) * static_cast<F>(0x1p-24f);
    const F p = chance_of<F>(model) + static_cast<F>(rank) * spread_of<F>(model);
    const F kept = (head.flags & kPerElement) != 0 ? delta / p : delta;
    return drawn < p ? kept : F{};
  }
};

template <class Kept, bool kElect>
struct SparsePoint {
  using ModelType = typename Kept::ModelType;

  template <int K>
  static constexpr int64_t kNumbers = 0;

  template <int K, class F, class Load>
  PM_DEVICE F get(F base, Load load, const Head& head, const ModelType* models, const F*, int count,
                  int64_t at, bool& finite) {
    const uint32_t mixed = mask_mix(head.start + static_cast<uint32_t>(at));
    const auto value = [&](int k) {
      const F delta = load(k) - base;
      finite = finite & is_finite(delta);
      const F kept = Kept::template keep<F>(delta, head, models[k], mixed, at);
      return weight_of<F>(models[k]) * (factor_of<F>(models[k]) * kept);
    };
    F v[K > 0 ? K : 1];
    F s = 0;
#pragma unroll
    for (int k = 0; k < (K > 0 ? K : count); ++k) {
      const F one = value(k);
      v[K > 0 ? k : 0] = one;
      s = s + one;
    }
    F merged = s;
    if (kElect) {
      // s begins with +0 and so is never -0: its sign bit is the elected sign.
      const auto sign = sign_bit(s);
      F sum = 0, divisor = 0;
#pragma unroll
      for (int k = 0; k < (K > 0 ? K : count); ++k) {
        const F u = flip(K > 0 ? v[K > 0 ? k : 0] : value(k), sign);
        const bool agrees = !(u <= 0);
        sum = agrees ? sum + u : sum;
        divisor = agrees ? divisor + weight_of<F>(models[k]) : divisor;
      }
      if ((head.flags & kDivideByWeights) != 0) sum = sum / (divisor == 0 ? F{1} : divisor);
      if ((head.flags & kDivide) != 0) sum = sum / divisor_of<F>(head);
      merged = s != s ? s : flip(sum, sign);
    } else if ((head.flags & kDivide) != 0) {
      merged = s / divisor_of<F>(head);
    }
    const F added = scale_of<F>(head) * merged;
    return (head.flags & kBare) != 0 ? added : base + added;
  }
};

}  // namespace cuda
}  // namespace pymerge
