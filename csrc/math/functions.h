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

// e^x for |x| <= 87; x beyond is clamped. Of N numbers, in step: each operation waits for the one
// before it, so one number alone leaves most of a processor idle.
template <int N, class F>
PM_INLINE void exp32_of(F* x) {
  using Bits = typename Traits<F>::Bits;
  const F top = splat<F>(87.0f);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const F magic = splat<F>(12582912.0f);
  F shifted[N], p[N];
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    // NaN is kept.
    x[i] = Traits<F>::smaller(top, x[i]);
    x[i] = Traits<F>::larger(-top, x[i]);
    shifted[i] = x[i] * splat<F>(1.44269504088896341f) + magic;
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    const F n = shifted[i] - magic;
    x[i] = x[i] - n * splat<F>(0.693359375f);
    x[i] = x[i] - n * splat<F>(-2.12194440e-4f);
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = splat<F>(1.9875691500e-4f) * x[i] + splat<F>(1.3981999507e-3f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat<F>(8.3334519073e-3f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat<F>(4.1665795894e-2f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat<F>(1.6666665459e-1f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat<F>(5.0000001201e-1f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    const F y = p[i] * (x[i] * x[i]) + x[i] + splat<F>(1.0f);
    const Bits exponent = bit_cast<Bits>(shifted[i]) - bit_cast<Bits>(magic);
    x[i] = y * bit_cast<F>(to_exponent(exponent + splat_bits<F>(127)));
  }
}

template <class F>
PM_INLINE F exp32(F x) {
  exp32_of<1>(&x);
  return x;
}

// tanh of N numbers, in step.
template <int N, class F>
PM_INLINE void tanh32_of(F* x) {
  using Bits = typename Traits<F>::Bits;
  const F one = splat<F>(1.0f), two = splat<F>(2.0f);
  F z[N], p[N];
  PM_UNROLL
  for (int i = 0; i < N; ++i) z[i] = x[i] * x[i];
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    p[i] = splat<F>(-5.70498872745e-3f) * z[i] + splat<F>(2.06390887954e-2f);
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * z[i] + splat<F>(-5.37397155531e-2f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * z[i] + splat<F>(1.33314422036e-1f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * z[i] + splat<F>(-3.33332819422e-1f);
  auto large = Traits<F>::at_least(splat_bits<F>(0), splat_bits<F>(1));
  F near[N];
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    near[i] = p[i] * z[i] * x[i] + x[i];
    const auto here =
        Traits<F>::at_least(magnitude_key(x[i]), splat_bits<F>(bit_cast<int32_t>(0.625f)));
    large = i == 0 ? here : Traits<F>::either(large, here);
  }
  // Small arguments are the rule, and the rest costs several times as much. NaN counts as large.
  if (Traits<F>::any(large)) {
    F far[N];
    PM_UNROLL
    for (int i = 0; i < N; ++i) far[i] = two * bit_cast<F>(magnitude_key(x[i]));
    exp32_of<N>(far);
    PM_UNROLL
    for (int i = 0; i < N; ++i) {
      far[i] = one - two / (far[i] + one);
      const F with_sign =
          bit_cast<F>(bit_cast<Bits>(far[i]) | (bit_cast<Bits>(x[i]) & Traits<F>::kSignMask));
      const F size = bit_cast<F>(magnitude_key(x[i]));
      near[i] = size < splat<F>(0.625f) ? near[i] : with_sign;
    }
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) x[i] = near[i];
}

template <class F>
PM_INLINE F tanh32(F x) {
  tanh32_of<1>(&x);
  return x;
}

}  // namespace pymerge
