// csrc/cuda/intrinsics.h for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pymerge {
namespace cuda {

#define PM_DEVICE static inline

PM_DEVICE void require_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) shim::mistake("misaligned vector");
}

PM_DEVICE uint4 load_once(const uint4* p) {
  require_aligned(p);
  return *p;
}

PM_DEVICE void store_once(uint4* p, uint4 v) {
  require_aligned(p);
  *p = v;
}

PM_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

PM_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

PM_DEVICE float widen_f16(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, exponent = (half >> 10) & 31,
                 fraction = half & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | (fraction << 13));
  const float magnitude =
      std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction | 0x400),
                 static_cast<int>(exponent == 0 ? 1 : exponent) - 25);
  return sign != 0 ? -magnitude : magnitude;
}

PM_DEVICE uint32_t narrow_f16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude == 0.0f) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);
  if (exponent < -13) exponent = -13;
  // Units in the last place, rounded to nearest even; a carry goes into the exponent.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return sign | (units + (static_cast<uint32_t>(exponent + 13) << 10));
}

PM_DEVICE uint32_t narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

PM_DEVICE float2 unpack_f16(uint32_t pair) {
  return {widen_f16(pair & 0xffff), widen_f16(pair >> 16)};
}

PM_DEVICE uint32_t pack_f16(float low, float high) {
  return narrow_f16(low) | (narrow_f16(high) << 16);
}

PM_DEVICE uint32_t pack_bf16(float low, float high) {
  return narrow_bf16(low) | (narrow_bf16(high) << 16);
}

// As inaccurate as is allowed.
PM_DEVICE float approximate_reciprocal(float x) {
  return std::nextafter(1.0f / x, static_cast<int>(x) % 2 == 0 ? 0.0f : 2.0f);
}

PM_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

PM_DEVICE int32_t* dynamic_shared() { return reinterpret_cast<int32_t*>(shim::dynamic_shared); }

PM_DEVICE int bits_in(uint32_t x) { return __builtin_popcount(x); }

PM_DEVICE int32_t warp_read(int32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

PM_DEVICE int32_t warp_sum(int32_t x) { return __reduce_add_sync(0xffffffffu, x); }

}  // namespace cuda
}  // namespace pymerge
