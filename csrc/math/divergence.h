// KL(softmax(x) || softmax(y)) of two rows with kFloor added to each probability, in doubles and
// always in one order: only +, -, *, / and integer operations.
//
// Sums of P log(P / Q) cancel if the rows are nearly equal: the terms are as large as the changes,
// the sum only as large as their squares. P and Q have the same sum, so the terms P log(P / Q) - P
// + Q have the same sum as P log(P / Q), and none of them is negative: nothing cancels. With t =
// log(q / p) computed from the inputs themselves, each term is accurate to a few units in the last
// place, however small.
#pragma once

#include <cstdint>

#include "math/value.h"

namespace pymerge {

constexpr double kFloor = 1e-8;    // as in mergekit
constexpr double kNearLog = 0.34;  // |t| up to which e^t - 1 needs no reduction: < ln(2) / 2
constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
constexpr int64_t kRounderBits = 0x4338000000000000;
constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;
constexpr double kLn2 = 0.6931471805599453;

// sum r^j / (j + 2)!
template <class F>
PM_INLINE F expm1_tail(F r) {
  F p = splat<F>(1.0 / 6227020800);
  p = p * r + splat<F>(1.0 / 479001600);
  p = p * r + splat<F>(1.0 / 39916800);
  p = p * r + splat<F>(1.0 / 3628800);
  p = p * r + splat<F>(1.0 / 362880);
  p = p * r + splat<F>(1.0 / 40320);
  p = p * r + splat<F>(1.0 / 5040);
  p = p * r + splat<F>(1.0 / 720);
  p = p * r + splat<F>(1.0 / 120);
  p = p * r + splat<F>(1.0 / 24);
  p = p * r + splat<F>(1.0 / 6);
  return p * r + splat<F>(1.0 / 2);
}

// sum z^j / (2 j + 3): log(1 + f) = 2 s + 2 s z times this, s = f / (2 + f), z = s^2
template <class F>
PM_INLINE F log_tail(F z) {
  F p = splat<F>(1.0 / 21);
  p = p * z + splat<F>(1.0 / 19);
  p = p * z + splat<F>(1.0 / 17);
  p = p * z + splat<F>(1.0 / 15);
  p = p * z + splat<F>(1.0 / 13);
  p = p * z + splat<F>(1.0 / 11);
  p = p * z + splat<F>(1.0 / 9);
  p = p * z + splat<F>(1.0 / 7);
  p = p * z + splat<F>(1.0 / 5);
  return p * z + splat<F>(1.0 / 3);
}

// e^r - 1 for |r| <= ln(2) / 2.
template <class F>
PM_INLINE F expm1_small(F r) {
  return r + (r * r) * expm1_tail(r);
}

// e^x for |x| <= 708; x beyond is clamped, NaN is kept.
template <class F>
PM_INLINE F exp64(F x) {
  using Bits = typename Traits<F>::Bits;
  const F top = splat<F>(708.0);
  x = x > top ? top : x;
  x = x < -top ? -top : x;
  const F rounder = splat<F>(kRounder);
  const F shifted = x * splat<F>(1.4426950408889634) + rounder;
  const F n = shifted - rounder;
  const F r =
      (x - n * splat<F>(6.93147180369123816490e-01)) - n * splat<F>(1.90821492927058770002e-10);
  // The integer is in the low bits; for NaN any bits may result.
  const Bits exponent = bit_cast<Bits>(shifted) & splat_bits<F>(0xfff);
  const Bits power = ((exponent + splat_bits<F>(1023)) & splat_bits<F>(0x7ff)) << 52;
  return (expm1_small(r) + splat<F>(1.0)) * bit_cast<F>(power);
}

// v = 2^k m with m from sqrt(1/2) to sqrt(2), for v from 2^-100 on.
template <class F>
struct Split {
  typename Traits<F>::Bits k;
  F m;
};

template <class F>
PM_INLINE Split<F> split(F v) {
  using Bits = typename Traits<F>::Bits;
  const Bits bias = splat_bits<F>(int64_t{128} << 52);  // nothing that is shifted is negative
  const Bits bits = bit_cast<Bits>(v) & splat_bits<F>(INT64_MAX);
  const Bits biased = (bits - splat_bits<F>(kSqrtHalfBits) + bias) >> 52;
  return {biased - splat_bits<F>(128), bit_cast<F>(bits - (biased << 52) + bias)};
}

// A small integer as a double.
template <class F>
PM_INLINE F small_integer(typename Traits<F>::Bits k) {
  return bit_cast<F>(k + splat_bits<F>(kRounderBits)) - splat<F>(kRounder);
}

// f - log(1 + f) for 1 + f from sqrt(1/2) to sqrt(2).
template <class F>
PM_INLINE F log_excess(F f) {
  const F s = f / (f + splat<F>(2.0));
  const F z = s * s;
  return s * (f - (z + z) * log_tail(z));
}

// log(v) for v from 2^-100 on.
template <class F>
PM_INLINE F log64(F v) {
  const Split<F> parts = split(v);
  const F f = parts.m - splat<F>(1.0);
  return small_integer<F>(parts.k) * splat<F>(kLn2) + (f - log_excess(f));
}

// The divisor of each row, and log(Z_x / Z_y).
template <class F>
struct DivergenceRow {
  F x_max, y_max;
  F x_scale, y_scale;
  F shift;
};

template <class F>
PM_INLINE DivergenceRow<F> divergence_row(F x_max, F y_max, F x_sum, F y_sum) {
  const F one = splat<F>(1.0);
  return {x_max, y_max, one / x_sum, one / y_sum, (x_max - y_max) + log64<F>(x_sum / y_sum)};
}

// P log(P / Q) - P + Q of an element, given its difference x - y, p = exp(x - x_max), and a
// function that returns exp(y - y_max) if needed. any: whether any lane of a comparison is true.
template <class F, class OfBase, class Any>
PM_INLINE F divergence_term(F difference, F x_exp, OfBase y_exp, const DivergenceRow<F>& row,
                            Any any) {
  const F t = row.shift - difference;
  const F p = x_exp * row.x_scale;
  const F own = p + splat<F>(kFloor);
  const F change = p * expm1_small(t);
  const F s = change / ((own + own) + change);
  const F z = s * s;
  const F near = s * (change - (own + own) * (z * log_tail(z)));
  // NaN counts as far.
  const auto is_near = (t <= splat<F>(kNearLog)) & (t >= splat<F>(-kNearLog));
  if (!any(is_near == 0)) return near;
  const F q = y_exp() * row.y_scale;
  const F u = q - p;
  const F w = u / own;
  const Split<F> parts = split<F>((q + splat<F>(kFloor)) / own);
  const F f = parts.k == 0 ? w : parts.m - splat<F>(1.0);
  const F far = own * (((w - f) - small_integer<F>(parts.k) * splat<F>(kLn2)) + log_excess(f));
  return is_near ? near : far;
}

// The same, given the elements of both rows.
template <class F, class Any>
PM_INLINE F divergence_point(F x, F y, const DivergenceRow<F>& row, Any any) {
  return divergence_term<F>(
      x - y, exp64<F>(x - row.x_max), [&] { return exp64<F>(y - row.y_max); }, row, any);
}

}  // namespace pymerge
