// TIES: trim, elect sign, disjoint merge (Yadav et al. 2023, Algorithm 1), in every dialect.
//
//   t_k = bits(|x_k - base|) >= threshold_k ? x_k - base : 0         trim
//   v_k = w_k t_k (Weighting::kBefore), else t_k
//   s   = sum_k v_k, or sum_k sgn(v_k)                               elect, k = 0 .. K-1 in order
//   s   = zero_sign where s == 0
//   u_k = v_k with its sign flipped where s is negative              agreement is u_k > 0
//   c_k = u_k > 0 ? (w_k u_k with Weighting::kAfter, else u_k) : 0
//   m   = sum_k c_k / divisor | sum_k c_k | max_k |c_k|              disjoint merge
//   out = base + scale * (m with the sign of s)
//
// Summing magnitudes and putting the sign back is the same arithmetic as summing signed values of
// one sign. A NaN vote gives NaN; where nothing is elected (s == 0) the base is kept.
#pragma once

#include "math/value.h"

namespace pymerge {

// Statistics of a run of elements, one lane each.
template <class F>
struct TiesSigns {
  typename Traits<F>::Bits balance;    // sum of sgn(s)
  typename Traits<F>::Bits zero_kept;  // s == 0 although something was kept
};

template <class F>
PM_INLINE F ties_trim(F delta, typename Traits<F>::Bits key, typename Traits<F>::Bits threshold) {
  return key >= threshold ? delta : F{};
}

template <class F>
PM_INLINE F ties_sign(F v) {
  const F one = splat<F>(1);
  return (v > F{} ? one : F{}) - (v < F{} ? one : F{});
}

// s with zeros replaced by the sign that a zero elects.
template <class F>
PM_INLINE F ties_elect(F s, F zero_sign) {
  return s == F{} ? zero_sign : s;
}

template <class F>
PM_INLINE typename Traits<F>::Bits sign_bit(F s) {
  return bit_cast<typename Traits<F>::Bits>(s) & Traits<F>::kSignMask;
}

template <class F>
PM_INLINE F flip(F x, typename Traits<F>::Bits sign) {
  return bit_cast<F>(bit_cast<typename Traits<F>::Bits>(x) ^ sign);
}

// All numbers of a call that are the same for all elements.
template <class F>
struct TiesCall {
  using Scalar = typename Traits<F>::Scalar;
  using IntScalar = typename Traits<F>::IntScalar;
  const IntScalar* thresholds;  // [num_models]
  const Scalar* weights;        // [num_models]
  int num_models;
  bool divide;             // a mean: divide by the count or the weights of those that agree
  bool divide_by_weights;  // read by ties_point_any only, as are the next three
  bool weigh_before;
  bool weigh_after;
  bool largest;         // merge by max |c_k|
  bool elect_count;     // s is a sum of signs
  IntScalar zero_step;  // for ties_point: 0 or -1 as a zero elects +1 or -1
  F zero_sign;          // for ties_point_any: +1, -1 or 0
  F scale;
};

template <class F>
PM_INLINE F ties_finish(F base, F merged, F vote, F elected, F scale) {
  merged = flip(merged, sign_bit(elected));
  merged = vote != vote ? vote : merged;
  return base + scale * merged;
}

template <class F>
PM_INLINE void ties_count_signs(F vote, typename Traits<F>::Bits kept, TiesSigns<F>& signs) {
  using Bits = typename Traits<F>::Bits;
  const Bits one = splat_bits<F>(1);
  signs.balance = signs.balance + (vote > F{} ? one : Bits{}) - (vote < F{} ? one : Bits{});
  signs.zero_kept = signs.zero_kept + ((vote == F{}) & (kept != Bits{}) ? one : Bits{});
}

// The common dialects of finite numbers, K known at compile time: election by mass, zeros elect +1
// or -1, merged by mean or sum; weights, if any, apply before the election and make up the divisor.
// thresholds must be in [1, infinity's key] (0 and 1 keep the same), scale finite and not 0.
//
// load(k) returns theta_k. Where a kept delta is not finite, the merged value is not finite either.
// `worst`, the largest key of the merged values, shows this, and ties_point_any gives the right
// result. (A sum of finite numbers that overflows shows up there, too.)
//
// Sums begin with +0 and are thus never -0. The elected sign is the sign bit of s, or, if a zero
// elects -1, the sign bit of s - 1 in integers: `zero_step`.
template <int K, bool kWeighted, bool kSigns, class F, class Load>
PM_INLINE F ties_point(F base, Load load, const TiesCall<F>& call, typename Traits<F>::Bits& worst,
                       TiesSigns<F>& signs) {
  using T = Traits<F>;
  using Bits = typename T::Bits;
  typename T::Mask kept[K];
  F v[K];
  F s{};
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const F delta = load(k) - base;
    kept[k] = T::at_least(magnitude_key(delta), splat_bits<F>(call.thresholds[k]));
    v[k] = kWeighted ? splat<F>(call.weights[k]) * delta : delta;
    // A kept value is not 0, but a product may be -0.
    s = k == 0 && !kWeighted ? T::keep(v[k], kept[k]) : T::add(s, v[k], kept[k]);
  }
  if (kSigns) {
    const Bits one = splat_bits<F>(1);
    const Bits bits = bit_cast<Bits>(s);
    const Bits most = bits > one ? one : bits;
    signs.balance = signs.balance + (most < -one ? -one : most);
    typename T::Mask any = kept[0];
    for (int k = 1; k < K; ++k) any = T::either(any, kept[k]);
    signs.zero_kept = T::count(signs.zero_kept, T::both(any, T::zero(s)));
  }
  const Bits sign = (bit_cast<Bits>(s) + splat_bits<F>(call.zero_step)) & T::kSignMask;
  F sum{};
  F divisor{};
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const F u = flip(v[k], sign);
    const auto agrees = T::positive(u, kept[k]);
    const F share = splat<F>(kWeighted ? call.weights[k] : 1);
    sum = k == 0 ? T::keep(u, agrees) : T::add(sum, u, agrees);
    divisor = k == 0 ? T::keep(share, agrees) : T::add(divisor, share, agrees);
  }
  const Bits key = magnitude_key(sum);
  worst = key > worst ? key : worst;
  if (call.divide) {
    const F one = splat<F>(1);
    // A count is not negative, so it is ordered as its bits are.
    const Bits count = bit_cast<Bits>(divisor), least = bit_cast<Bits>(one);
    sum = sum / (kWeighted ? (divisor == F{} ? one : divisor)
                           : bit_cast<F>(count > least ? count : least));
  }
  return base + call.scale * flip(sum, sign);
}

// Every dialect, any number of models. v has room for num_models values.
template <class F, class Load>
PM_INLINE F ties_point_any(F base, Load load, const TiesCall<F>& call, F* v,
                           typename Traits<F>::Bits& worst, TiesSigns<F>& signs) {
  using Bits = typename Traits<F>::Bits;
  const F one = splat<F>(1);
  F s{};
  Bits kept{};
  for (int k = 0; k < call.num_models; ++k) {
    const F delta = load(k) - base;
    const Bits key = magnitude_key(delta);
    worst = key > worst ? key : worst;
    F t = ties_trim(delta, key, splat_bits<F>(call.thresholds[k]));
    if (call.weigh_before) t = splat<F>(call.weights[k]) * t;
    v[k] = t;
    kept = kept | magnitude_key(t);
    s = s + (call.elect_count ? ties_sign(t) : t);
  }
  ties_count_signs(s, kept, signs);
  const F elected = ties_elect(s, call.zero_sign);
  const Bits sign = sign_bit(elected);
  F merged{};
  F divisor{};
  for (int k = 0; k < call.num_models; ++k) {
    const F u = flip(v[k], sign);
    F c = u > F{} ? u : F{};
    if (call.weigh_after) c = splat<F>(call.weights[k]) * c;
    if (call.largest) {
      const F size = bit_cast<F>(magnitude_key(c));
      // NaN (a weight of 0 times infinity) stays.
      merged = (size > merged) | (size != size) ? size : merged;
    } else {
      merged = merged + c;
    }
    divisor =
        divisor + (u > F{} ? (call.divide_by_weights ? splat<F>(call.weights[k]) : one) : F{});
  }
  if (call.divide) merged = merged / (divisor == F{} ? one : divisor);
  merged = elected == F{} ? F{} : merged;
  return ties_finish(base, merged, s, elected, call.scale);
}

}  // namespace pymerge
