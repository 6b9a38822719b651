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

// s with zeros replaced by what a zero elects.
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

// Everything about a call that is the same for all elements.
template <class F>
struct TiesCall {
  using Scalar = typename Traits<F>::Scalar;
  using IntScalar = typename Traits<F>::IntScalar;
  const IntScalar* thresholds;  // [num_models]
  const Scalar* weights;        // [num_models]
  int num_models;
  bool divide;             // a mean: divide by the count, or by the weights, of those that agree
  bool divide_by_weights;  // read by ties_point_any only, as are the next three
  bool weigh_before;
  bool weigh_after;
  bool largest;      // merge by max |c_k|
  bool elect_count;  // s is a sum of signs
  F zero_sign;       // +1, -1; 0 only for ties_point_any
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

// The common dialects, K known at compile time: election by mass, zeros elect +1 or -1, merged by
// mean or sum; weights, if any, apply before the election and make up the divisor.
// load(k) gives theta_k. `worst` collects the largest key, to find NaN and infinity.
template <int K, bool kWeighted, bool kSigns, class F, class Load>
PM_INLINE F ties_point(F base, Load load, const TiesCall<F>& call, typename Traits<F>::Bits& worst,
                       TiesSigns<F>& signs) {
  using Bits = typename Traits<F>::Bits;
  F v[K];
  F s{};
  Bits kept{};
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const F delta = load(k) - base;
    const Bits key = magnitude_key(delta);
    worst = key > worst ? key : worst;
    v[k] = ties_trim(delta, key, splat_bits<F>(call.thresholds[k]));
    if (kWeighted) v[k] = splat<F>(call.weights[k]) * v[k];
    if (kSigns) kept = kept | magnitude_key(v[k]);
    s = s + v[k];
  }
  if (kSigns) ties_count_signs(s, kept, signs);
  const F elected = ties_elect(s, call.zero_sign);
  const Bits sign = sign_bit(elected);
  F sum{};
  F divisor{};
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    const F u = flip(v[k], sign);
    sum = sum + (u > F{} ? u : F{});
    divisor = divisor + (u > F{} ? (kWeighted ? splat<F>(call.weights[k]) : splat<F>(1)) : F{});
  }
  if (call.divide) sum = sum / (divisor == F{} ? splat<F>(1) : divisor);
  return ties_finish(base, sum, s, elected, call.scale);
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
      merged = size > merged ? size : merged;
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
