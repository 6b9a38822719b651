// exp and tanh in single precision, with one polynomial each and the same bits on every backend:
// only +, -, *, / and integer operations, in this order. Coefficients: Cephes (Moshier), expf and
// tanhf. Within 2 units in the last place of the exact value.
#pragma once

#include <cstdint>

#include "math/value.h"

namespace pymerge {

// Shifts into the place of the exponent. A single integer is shifted as an unsigned one, since NaN
// may give any bits.
template <class Bits>
PM_INLINE Bits to_exponent(Bits x) {
  return x << 23;
}
PM_INLINE int32_t to_exponent(int32_t x) {
  return static_cast<int32_t>(static_cast<uint32_t>(x) << 23);
}

// y * 2^n for a whole number n, which is also in the low bits of `shifted`. If the processor has an
// instruction for it, Traits provides it.
template <class F>
PM_INLINE auto times_power(F y, F n, F, int) -> decltype(Traits<F>::times_power(y, n)) {
  return Traits<F>::times_power(y, n);
}
template <class F>
PM_INLINE F times_power(F y, F, F shifted, long) {
  using Bits = typename Traits<F>::Bits;
  const Bits exponent = bit_cast<Bits>(shifted) - splat_bits<F>(bit_cast<int32_t>(12582912.0f));
  return y * bit_cast<F>(to_exponent(exponent + splat_bits<F>(127)));
}

// x - n c, where n c is exact, so a fused operation gives the same bits. If the processor has one,
// Traits provides it.
template <class F>
PM_INLINE auto less_exact(F x, F n, F c, int) -> decltype(Traits<F>::less_exact(x, n, c)) {
  return Traits<F>::less_exact(x, n, c);
}
template <class F>
PM_INLINE F less_exact(F x, F n, F c, long) {
  return x - n * c;
}

// p[i] x[i] + c
template <int N, class F>
PM_INLINE void step_of(F* p, const F* x, float c) {
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + splat<F>(c);
}

// e^x for |x| <= 87. x beyond is clamped, unless it is known that there is none. N numbers go in
// step: each operation waits for the one before it, so a single number would leave most of a
// processor idle.
template <int N, bool kClamped = true, class F>
PM_INLINE void exp32_of(F* x) {
  const F top = splat<F>(87.0f);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const F magic = splat<F>(12582912.0f);
  F shifted[N], n[N], p[N];
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    if constexpr (kClamped) {
      // NaN is kept.
      x[i] = Traits<F>::smaller(top, x[i]);
      x[i] = Traits<F>::larger(-top, x[i]);
    }
    shifted[i] = x[i] * splat<F>(1.44269504088896341f) + magic;
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    n[i] = shifted[i] - magic;
    x[i] = less_exact(x[i], n[i], splat<F>(0.693359375f), 0);  // 7 bits times 9
    x[i] = x[i] - n[i] * splat<F>(-2.12194440e-4f);
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = splat<F>(1.9875691500e-4f) * x[i] + splat<F>(1.3981999507e-3f);
  step_of<N>(p, x, 8.3334519073e-3f);
  step_of<N>(p, x, 4.1665795894e-2f);
  step_of<N>(p, x, 1.6666665459e-1f);
  step_of<N>(p, x, 5.0000001201e-1f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    const F y = p[i] * (x[i] * x[i]) + x[i] + splat<F>(1.0f);
    x[i] = times_power(y, n[i], shifted[i], 0);
  }
}

template <class F>
PM_INLINE F exp32(F x) {
  exp32_of<1>(&x);
  return x;
}

// tanh of large magnitudes, with the sign of x. NaN counts as large.
template <int N, class F>
PM_INLINE void tanh32_far(const F* x, F* near) {
  using Bits = typename Traits<F>::Bits;
  const F one = splat<F>(1.0f), two = splat<F>(2.0f);
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

// tanh of N numbers, in step. Small arguments are the rule, and large ones cost several times as
// much. kRare: large arguments come alone, if at all.
template <int N, bool kRare = true, class F>
PM_INLINE void tanh32_of(F* x) {
  using Bits = typename Traits<F>::Bits;
  Bits largest = magnitude_key(x[0]);
  PM_UNROLL
  for (int i = 1; i < N; ++i) {
    const Bits key = magnitude_key(x[i]);
    largest = key > largest ? key : largest;
  }
  if constexpr (N > 1) {
    // Below 2^-12 the polynomial is within x (1 - x^2 / 3). That is nearer to x than half of the
    // distance between neighbouring floats (at least 2^-25 x), so it rounds to x. -0 becomes 0, as
    // in the polynomial.
    const Bits tiny = splat_bits<F>(bit_cast<int32_t>(0x1p-12f));
    if (!Traits<F>::any(Traits<F>::at_least(largest, tiny))) {
      PM_UNROLL
      for (int i = 0; i < N; ++i) x[i] = x[i] + F{};
      return;
    }
  }
  F z[N], p[N];
  PM_UNROLL
  for (int i = 0; i < N; ++i) z[i] = x[i] * x[i];
  PM_UNROLL
  for (int i = 0; i < N; ++i) {
    p[i] = splat<F>(-5.70498872745e-3f) * z[i] + splat<F>(2.06390887954e-2f);
  }
  step_of<N>(p, z, -5.37397155531e-2f);
  step_of<N>(p, z, 1.33314422036e-1f);
  step_of<N>(p, z, -3.33332819422e-1f);
  PM_UNROLL
  for (int i = 0; i < N; ++i) p[i] = p[i] * z[i] * x[i] + x[i];
  const Bits limit = splat_bits<F>(bit_cast<int32_t>(0.625f));
  if (Traits<F>::any(Traits<F>::at_least(largest, limit))) {
    if constexpr (kRare) {
      PM_UNROLL
      for (int i = 0; i < N; ++i) {
        if (Traits<F>::any(Traits<F>::at_least(magnitude_key(x[i]), limit))) {
          tanh32_far<1>(x + i, p + i);
        }
      }
    } else {
      tanh32_far<N>(x, p);
    }
  }
  PM_UNROLL
  for (int i = 0; i < N; ++i) x[i] = p[i];
}

template <class F>
PM_INLINE F tanh32(F x) {
  tanh32_of<1>(&x);
  return x;
}

}  // namespace pymerge
