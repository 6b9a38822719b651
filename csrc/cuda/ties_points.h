// TIES on a GPU: the arithmetic of math/ties.h in two forms that give the same bits.
#pragma once

#include "cuda/values.h"
#include "math/ties.h"

namespace pymerge {
namespace cuda {

// sum / count for a count of 1 .. K, correctly rounded, without the branches of a division.
//
// r is 1 / count correctly rounded: one Newton step from within an ulp or two of it is enough,
// since 1 / count is far from the midpoint of two floats. q is then within an ulp of the quotient,
// the remainder is exact (an integer times the ulp of q), and the last step rounds the quotient but
// for an error of 2^-24 of an ulp. No quotient by a small integer comes that close to the midpoint
// of two floats without lying on it, and it lies on it only if it is subnormal and the count is
// even. Powers of two have exact reciprocals, so from K = 6 on tiny sums are left to the other
// form.
PM_DEVICE float divide_by_count(float sum, float count) {
  float r = approximate_reciprocal(count);
  r = fmaf(r, fmaf(-count, r, 1.0f), r);
  const float q = sum * r;
  return fmaf(fmaf(-count, q, sum), r, q);
}

// The common dialects, K known at compile time: election by mass, zeros elect +1 or -1, merged by
// mean or sum; weights, if any, apply before the election and make up the divisor. Thresholds are
// in [1, infinity's key], scale is finite and not 0.
//
// Right for finite numbers. Sets `odd` where the result may be wrong: where the merged value is not
// finite, as is the case wherever a kept delta is not. Sums begin with +0 and are thus never -0.
//
// Whether a value is kept, and whether it agrees, are predicates of the additions here. That takes
// two instructions for every comparison and sum, where the form of math/ties.h for the CPU's
// vectors would clear values first.
//
// shares: each model's contribution to the divisor. It is the model's weight, or 1, or 0 for a sum,
// which makes the divisor 1.
template <int K, bool kWeighted, bool kSigns, class Load>
PM_DEVICE float ties_point_finite(float base, Load load, const TiesCall<float>& call,
                                  const int32_t* thresholds, const float* weights,
                                  const float* shares, bool& odd, TiesSigns<float>& signs) {
  using T = Traits<float>;
  bool kept[K];
  float v[K];
  float s = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float delta = load(k) - base;
    // Not below the threshold, or NaN: as the keys are ordered.
    kept[k] = !(fabsf(delta) < bit_cast<float>(thresholds[k]));
    v[k] = kWeighted ? weights[k] * delta : delta;
    s = k == 0 && !kWeighted ? T::keep(v[k], kept[k]) : T::add(s, v[k], kept[k]);
  }
  const int32_t bits = bit_cast<int32_t>(s);
  const int32_t sign = (bits + call.zero_step) & T::kSignMask;
  float sum = 0.0f, divisor = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float u = flip(v[k], sign);
    const bool agrees = !(u <= 0.0f) & kept[k];
    const float share = shares[k];
    sum = k == 0 ? T::keep(u, agrees) : T::add(sum, u, agrees);
    divisor = k == 0 ? T::keep(share, agrees) : T::add(divisor, share, agrees);
  }
  if (kSigns) {
    signs.balance += max(-1, min(1, bits));
    // Numbers that add up to 0 have both signs, so one of the kept ones agrees.
    signs.zero_kept = T::count(signs.zero_kept, (s == 0.0f) & (sum != 0.0f));
  }
  odd = odd | !(fabsf(sum) < bit_cast<float>(T::kInfinity));
  if (!kWeighted && K >= 6) odd = odd | ((fabsf(sum) < 0x1p-100f) & (sum != 0.0f));
  if (kWeighted) {
    sum = sum / (divisor == 0.0f ? 1.0f : divisor);
  } else if (K == 2) {
    sum = sum * (divisor == 2.0f ? 0.5f : 1.0f);
  } else if (K > 2) {
    sum = divide_by_count(sum, fmaxf(divisor, 1.0f));
  }
  return base + call.scale * flip(sum, sign);
}

// Every dialect, NaN and infinity: ties_point_any of math/ties.h, step by step. K = 0 takes any
// number of models, and recomputes a vote rather than store it.
template <int K, class F, class Load, class Thresholds, class Weights>
PM_DEVICE F ties_point_careful(F base, Load load, const TiesCall<F>& call, Thresholds thresholds,
                               Weights weights, typename Traits<F>::Bits& worst,
                               TiesSigns<F>& signs) {
  using Bits = typename Traits<F>::Bits;
  const F one = 1;
  const int count = K > 0 ? K : call.num_models;
  const auto vote = [&](int k, Bits& key) {
    const F delta = load(k) - base;
    key = magnitude_key(delta);
    const F t = ties_trim(delta, key, thresholds[k]);
    return call.weigh_before ? weights[k] * t : t;
  };
  F v[K > 0 ? K : 1];
  F s = 0;
  Bits kept = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    Bits key;
    const F t = vote(k, key);
    worst = key > worst ? key : worst;
    v[K > 0 ? k : 0] = t;
    kept = kept | magnitude_key(t);
    s = s + (call.elect_count ? ties_sign(t) : t);
  }
  ties_count_signs(s, kept, signs);
  const F elected = ties_elect(s, call.zero_sign);
  const Bits sign = sign_bit(elected);
  F merged = 0;
  F divisor = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    Bits key;
    const F u = flip(K > 0 ? v[K > 0 ? k : 0] : vote(k, key), sign);
    F c = u > 0 ? u : F{};
    if (call.weigh_after) c = weights[k] * c;
    const F size = bit_cast<F>(magnitude_key(c));
    const F largest = size > merged ? size : merged;
    merged = call.largest ? largest : merged + c;
    divisor = divisor + (u > 0 ? (call.divide_by_weights ? weights[k] : one) : F{});
  }
  if (call.divide) merged = merged / (divisor == 0 ? one : divisor);
  merged = elected == 0 ? F{} : merged;
  return ties_finish(base, merged, s, elected, call.scale);
}

}  // namespace cuda
}  // namespace pymerge
