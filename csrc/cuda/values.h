// The value types of the GPU: plain float and double. Masks are predicates.
#pragma once

#include "cuda/intrinsics.h"
#include "math/value.h"

namespace pymerge {

template <class F, class BitsOfF>
struct ScalarMasks {
  using Mask = bool;
  PM_INLINE bool at_least(BitsOfF key, BitsOfF threshold) { return key >= threshold; }
  PM_INLINE bool greater(F a, F b) { return a > b; }
  // x > 0 or NaN, within `among`
  PM_INLINE bool positive(F x, bool among) { return !(x <= F{}) & among; }
  PM_INLINE bool zero(F x) { return x == F{}; }
  PM_INLINE bool any(bool chosen) { return chosen; }
  PM_INLINE F larger(F a, F b) { return a > b ? a : b; }
  PM_INLINE F smaller(F a, F b) { return a < b ? a : b; }
  PM_INLINE bool both(bool a, bool b) { return a & b; }
  PM_INLINE bool either(bool a, bool b) { return a | b; }
  PM_INLINE F keep(F x, bool chosen) { return chosen ? x : F{}; }
  PM_INLINE F add(F sum, F x, bool chosen) { return chosen ? sum + x : sum; }
  PM_INLINE BitsOfF count(BitsOfF counts, bool chosen) { return counts + (chosen ? 1 : 0); }
};

template <>
struct Traits<float> : ScalarMasks<float, int32_t> {
  using Scalar = float;
  using IntScalar = int32_t;
  using Bits = int32_t;
  static constexpr int32_t kMagnitudeMask = INT32_MAX;
  static constexpr int32_t kSignMask = INT32_MIN;
  static constexpr int32_t kInfinity = 0x7f800000;
  // Thresholds are keys of numbers, and NaN is above all of them. So one comparison of floats,
  // which takes |x| for free, replaces a mask and a comparison of integers.
  PM_INLINE bool at_least(int32_t key, int32_t threshold) {
    return !(bit_cast<float>(key) < bit_cast<float>(threshold));
  }
};

template <>
struct Traits<double> : ScalarMasks<double, int64_t> {
  using Scalar = double;
  using IntScalar = int64_t;
  using Bits = int64_t;
  static constexpr int64_t kMagnitudeMask = INT64_MAX;
  static constexpr int64_t kSignMask = INT64_MIN;
  static constexpr int64_t kInfinity = 0x7ff0000000000000;
};

namespace cuda {

PM_DEVICE bool is_finite(float x) { return fabsf(x) < bit_cast<float>(Traits<float>::kInfinity); }
PM_DEVICE bool is_finite(double x) { return magnitude_key(x) < Traits<double>::kInfinity; }

}  // namespace cuda
}  // namespace pymerge
