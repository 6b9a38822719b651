// exp and tanh in single precision from one polynomial each, the same bits on every backend: only
// +, -, *, / and integer operations, in this order. Coefficients: Cephes (Moshier), expf and tanhf.
// Within 2 units in the last place of the exact value.
#pragma once

#include "math/value.h"

namespace pymerge {

// Into the place of the exponent. For one integer the shift is of an unsigned one: of NaN any bits
// may come.
template <class Bits>
PM_INLINE Bits to_exponent(Bits x) {
  return x << 23;
}
PM_INLINE int32_t to_exponent(int32_t x) {
  return static_cast<int32_t>(static_cast<uint32_t>(x) << 23);
}

// e^x for |x| <= 87; x beyond is clamped.
template <class F>
PM_INLINE F exp32(F x) {
  using Bits = typename Traits<F>::Bits;
  const F top = splat<F>(87.0f);
  // NaN is kept.
  x = Traits<F>::smaller(top, x);
  x = Traits<F>::larger(-top, x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const F magic = splat<F>(12582912.0f);
  const F shifted = x * splat<F>(1.44269504088896341f) + magic;
  const F n = shifted - magic;
  F r = x - n * splat<F>(0.693359375f);
  r = r - n * splat<F>(-2.12194440e-4f);
  F p = splat<F>(1.9875691500e-4f);
  p = p * r + splat<F>(1.3981999507e-3f);
  p = p * r + splat<F>(8.3334519073e-3f);
  p = p * r + splat<F>(4.1665795894e-2f);
  p = p * r + splat<F>(1.6666665459e-1f);
  p = p * r + splat<F>(5.0000001201e-1f);
  const F y = p * (r * r) + r + splat<F>(1.0f);
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<Bits>(magic);
  return y * bit_cast<F>(to_exponent(exponent + splat_bits<F>(127)));
}

template <class F>
PM_INLINE F tanh32(F x) {
  using Bits = typename Traits<F>::Bits;
  const F one = splat<F>(1.0f), two = splat<F>(2.0f);
  const F size = bit_cast<F>(magnitude_key(x));
  const F z = x * x;
  F p = splat<F>(-5.70498872745e-3f);
  p = p * z + splat<F>(2.06390887954e-2f);
  p = p * z + splat<F>(-5.37397155531e-2f);
  p = p * z + splat<F>(1.33314422036e-1f);
  p = p * z + splat<F>(-3.33332819422e-1f);
  const F near = p * z * x + x;
  // Small arguments are the rule, and the rest costs several times as much. NaN counts as large.
  const auto large =
      Traits<F>::at_least(magnitude_key(x), splat_bits<F>(bit_cast<int32_t>(0.625f)));
  if (!Traits<F>::any(large)) return near;
  const F far = one - two / (exp32(two * size) + one);
  const F signed_far =
      bit_cast<F>(bit_cast<Bits>(far) | (bit_cast<Bits>(x) & Traits<F>::kSignMask));
  return size < splat<F>(0.625f) ? near : signed_far;
}

}  // namespace pymerge
