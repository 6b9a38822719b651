// Vectors, loads and stores for one instruction set. The including file defines PM_VECTOR_BYTES.
// Everything has internal linkage: see math/value.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "math/value.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace pymerge {

#define PM_VECTOR(type) type __attribute__((vector_size(PM_VECTOR_BYTES)))
using F = PM_VECTOR(float);
using I = PM_VECTOR(int32_t);
using U = PM_VECTOR(uint32_t);
using D = PM_VECTOR(double);
using L = PM_VECTOR(int64_t);
using Halves = uint16_t __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
using Unaligned = uint32_t
    __attribute__((vector_size(PM_VECTOR_BYTES), aligned(1), may_alias));  // any address, any type

#if defined(__AVX512F__)
struct FloatMasks {
  using Mask = __mmask16;
  PM_INLINE Mask at_least(I key, I threshold) {
    return _mm512_cmp_epi32_mask((__m512i)key, (__m512i)threshold, _MM_CMPINT_NLT);
  }
  PM_INLINE Mask between(I key, I least, I most) {
    return _mm512_mask_cmp_epi32_mask(at_least(key, least), (__m512i)most, (__m512i)key,
                                      _MM_CMPINT_NLT);
  }
  PM_INLINE Mask greater(F a, F b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
  PM_INLINE Mask positive(F x, Mask among) {
    return _mm512_mask_cmp_ps_mask(among, (__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  }
  PM_INLINE Mask zero(F x) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_EQ_OQ);
  }
  PM_INLINE Mask everything() { return 0xffff; }
  PM_INLINE Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
  PM_INLINE Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
  PM_INLINE F keep(F x, Mask chosen) { return (F)_mm512_maskz_mov_ps(chosen, (__m512)x); }
  PM_INLINE F add(F sum, F x, Mask chosen) {
    return (F)_mm512_mask_add_ps((__m512)sum, chosen, (__m512)sum, (__m512)x);
  }
  PM_INLINE I count(I counts, Mask chosen) {
    return (I)_mm512_mask_sub_epi32((__m512i)counts, chosen, (__m512i)counts,
                                    _mm512_set1_epi32(-1));
  }
  PM_INLINE Mask equal(I a, I b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
  PM_INLINE Mask less(I a, I b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
  PM_INLINE Mask at_most(U a, U b) { return _mm512_cmple_epu32_mask((__m512i)a, (__m512i)b); }
  PM_INLINE bool any(Mask chosen) { return chosen != 0; }
  PM_INLINE Mask not_less(F x, F y) {
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLT_UQ);
  }
  PM_INLINE F larger(F a, F b) { return (F)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
  PM_INLINE F smaller(F a, F b) { return (F)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
  PM_INLINE F about(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  PM_INLINE F less_exact(F x, F n, F c) {
    return (F)_mm512_fnmadd_ps((__m512)n, (__m512)c, (__m512)x);
  }
  PM_INLINE F times_power(F y, F n) {
    return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)n);
  }
  PM_INLINE Mask within(I offset, I span, Mask not_these) {
    const Mask within = _mm512_cmple_epu32_mask((__m512i)offset, (__m512i)span);
    return _kandn_mask16(not_these, within);
  }
};
#else
struct FloatMasks : VectorMasks<F, I> {
#if defined(__AVX2__)
  PM_INLINE F larger(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
  PM_INLINE F smaller(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
  PM_INLINE F larger(F a, F b) { return (F)_mm_max_ps((__m128)a, (__m128)b); }
  PM_INLINE F smaller(F a, F b) { return (F)_mm_min_ps((__m128)a, (__m128)b); }
#endif
  PM_INLINE Mask equal(I a, I b) { return a == b; }
  PM_INLINE Mask less(I a, I b) { return a < b; }
  // a * b + c, rounded once or twice: for bounds only, never for part of a result.
#if defined(__FMA__)
  PM_INLINE F about(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  PM_INLINE F less_exact(F x, F n, F c) {
    return (F)_mm256_fnmadd_ps((__m256)n, (__m256)c, (__m256)x);
  }
#else
  PM_INLINE F about(F a, F b, F c) { return a * b + c; }
#endif
  // x >= y, or one is NaN
  PM_INLINE Mask not_less(F x, F y) { return ~(x < y); }
  PM_INLINE Mask at_most(U a, U b) { return a <= b; }
  PM_INLINE bool any(Mask chosen) {
#if defined(__AVX2__)
    return _mm256_testz_si256((__m256i)chosen, (__m256i)chosen) == 0;
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)chosen) != 0;
#else
    int32_t all = 0;
    for (int i = 0; i < PM_VECTOR_BYTES / 4; ++i) all |= chosen[i];
    return all != 0;
#endif
  }
  // 0 <= offset <= span
  PM_INLINE Mask within(I offset, I span, Mask not_these) {
    return (offset >= I{}) & (offset <= span) & ~not_these;
  }
};
#endif

template <>
struct Traits<F> : FloatMasks {
  using Scalar = float;
  using IntScalar = int32_t;
  using Bits = I;
  static constexpr int32_t kMagnitudeMask = 0x7fffffff;
  static constexpr int32_t kSignMask = INT32_MIN;
  static constexpr int32_t kInfinity = 0x7f800000;
};

template <>
struct Traits<D> : VectorMasks<D, L> {
  using Scalar = double;
  using IntScalar = int64_t;
  using Bits = L;
  static constexpr int64_t kMagnitudeMask = INT64_MAX;
  static constexpr int64_t kSignMask = INT64_MIN;
  static constexpr int64_t kInfinity = 0x7ff0000000000000;
};

namespace {

constexpr int kLanes = PM_VECTOR_BYTES / 4;   // floats in a vector
constexpr int kDLanes = PM_VECTOR_BYTES / 8;  // doubles in a vector
constexpr int kStep = 2 * kLanes;             // elements that one step of a kernel takes

PM_INLINE U load_bits(const void* p) { return (U) * static_cast<const Unaligned*>(p); }
PM_INLINE void store_bits(void* p, U v) { *static_cast<Unaligned*>(p) = (Unaligned)v; }

// As many floats as a vector has doubles.
PM_INLINE D load_doubles(const float* p) {
#if defined(__AVX512F__)
  return (D)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#else
  D all;
  for (int i = 0; i < PM_VECTOR_BYTES / 8; ++i) all[i] = p[i];
  return all;
#endif
}

// A store that bypasses the caches; p must be aligned to PM_VECTOR_BYTES.
PM_INLINE void stream_bits(void* p, U v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  store_bits(p, v);
#endif
}

PM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One bit per lane.
PM_INLINE uint32_t lane_bits(FloatMasks::Mask mask) {
#if defined(__AVX512F__)
  return mask;
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i] != 0 ? 1u << i : 0u;
  return bits;
#endif
}

// fp32 -> bf16 in the high half of each lane, round to nearest even. NaN stays NaN, unless kFinite
// says that there is none.
template <bool kFinite>
PM_INLINE U round_bf16(F x) {
  const U u = (U)x;
  const U rounded = u + 0x7fff + ((u >> 16) & 1);
  return kFinite ? rounded : (I)(x != x) ? U{} + 0x7fc00000 : rounded;
}

PM_INLINE F load_f16(const void* p) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  uint16_t half[kLanes];
  std::memcpy(half, p, sizeof(half));
  U h;
  for (int i = 0; i < kLanes; ++i) h[i] = half[i];
  // Shift exponent and mantissa into place and scale by 2^112, which is exact, subnormals included.
  const U magnitude = (h & 0x7fff) << 13;
  const F scaled = (F)magnitude * (F{} + 0x1p112f);
  const U special = (I)(magnitude >= 0x0f800000) ? U{} + 0x7f800000 : U{};
  return (F)((U)scaled | special | ((h & 0x8000) << 16));
#endif
}

PM_INLINE void store_f16(void* p, F x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const U u = (U)x;
  const U sign = (u >> 16) & 0x8000;
  const U magnitude = u & 0x7fffffff;
  // Subnormal halves: adding 0.5 lines the mantissa up with 2^-24 and rounds to nearest even.
  const U subnormal = (U)((F)magnitude + (F{} + 0.5f)) - 0x3f000000;
  const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  U half = (I)(magnitude < 0x38800000) ? subnormal : normal;
  half = (I)(magnitude >= 0x47800000) ? U{} + 0x7c00 : half;
  half = (I)(magnitude > 0x7f800000) ? U{} + 0x7e00 : half;
  half |= sign;
  uint16_t out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint16_t>(half[i]);
  std::memcpy(p, out, sizeof(out));
#endif
}

// load<Half> returns one of the two vectors of a step, store<Stream, kFinite> takes both; kFinite
// promises that there is no NaN.
//
// How a step of kStep elements is split into two vectors: elementwise kernels do not care which
// lane holds which element, so bf16 takes the even elements first and the odd ones second. That
// needs one operation each instead of a widening shuffle.
template <int kStride>
PM_INLINE U lane_numbers(int first) {
  U numbers;
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<uint32_t>(kStride * i + first);
  return numbers;
}

// Every other number of low and high, starting from the first or the second.
template <int First>
PM_INLINE I every_other(I low, I high) {
#if defined(__AVX512F__)
  return (I)_mm512_permutex2var_epi32((__m512i)low, (__m512i)lane_numbers<2>(First), (__m512i)high);
#elif defined(__AVX2__)
  const __m256 halves = _mm256_shuffle_ps((__m256)low, (__m256)high, First == 0 ? 0x88 : 0xdd);
  return (I)_mm256_permute4x64_pd((__m256d)halves, 0xd8);
#elif defined(__SSE2__)
  return (I)_mm_shuffle_ps((__m128)low, (__m128)high, First == 0 ? 0x88 : 0xdd);
#else
  I chosen;
  for (int i = 0; i < kLanes; ++i) {
    const int from = 2 * i + First;
    chosen[i] = from < kLanes ? low[from] : high[from - kLanes];
  }
  return chosen;
#endif
}

struct Bf16 {
  static constexpr Dtype kDtype = Dtype::kBF16;
  static constexpr int kBytes = 2;
  // Which element of the step is in which lane.
  template <int Half>
  PM_INLINE U lanes() {
    return lane_numbers<2>(Half);
  }
  // Arranges the numbers of a step's elements in the order of its lanes.
  template <int Half>
  PM_INLINE I in_lanes(const int32_t* numbers) {
    return every_other<Half>((I)load_bits(numbers), (I)load_bits(numbers + kLanes));
  }
  template <int Half>
  PM_INLINE F load(const char* p) {
    const U pair = load_bits(p);
    return Half == 0 ? (F)(pair << 16) : (F)(pair & 0xffff0000u);
  }
  template <bool Stream, bool kFinite>
  PM_INLINE void store(char* p, F even, F odd) {
    const U pair = (round_bf16<kFinite>(even) >> 16) | (round_bf16<kFinite>(odd) & 0xffff0000u);
    Stream ? stream_bits(p, pair) : store_bits(p, pair);
  }
};

struct F16 {
  static constexpr Dtype kDtype = Dtype::kF16;
  static constexpr int kBytes = 2;
  template <int Half>
  PM_INLINE U lanes() {
    return lane_numbers<1>(Half * kLanes);
  }
  template <int Half>
  PM_INLINE F load(const char* p) {
    return load_f16(p + Half * 2 * kLanes);
  }
  template <bool Stream, bool kFinite>
  PM_INLINE void store(char* p, F low, F high) {
    alignas(PM_VECTOR_BYTES) char both[PM_VECTOR_BYTES];
    store_f16(both, low);
    store_f16(both + 2 * kLanes, high);
    const U bits = load_bits(both);
    Stream ? stream_bits(p, bits) : store_bits(p, bits);
  }
};

struct F32 {
  static constexpr Dtype kDtype = Dtype::kF32;
  static constexpr int kBytes = 4;
  template <int Half>
  PM_INLINE U lanes() {
    return lane_numbers<1>(Half * kLanes);
  }
  template <int Half>
  PM_INLINE I in_lanes(const int32_t* numbers) {
    return (I)load_bits(numbers + Half * kLanes);
  }
  template <int Half>
  PM_INLINE F load(const char* p) {
    return (F)load_bits(p + Half * PM_VECTOR_BYTES);
  }
  template <bool Stream, bool kFinite>
  PM_INLINE void store(char* p, F low, F high) {
    if (Stream) {
      stream_bits(p, (U)low);
      stream_bits(p + PM_VECTOR_BYTES, (U)high);
    } else {
      store_bits(p, (U)low);
      store_bits(p + PM_VECTOR_BYTES, (U)high);
    }
  }
};

constexpr int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2;
}

// Writes load(i) for elements i to i + kLanes - 1, minus `minus` if given.
template <class Load>
PM_INLINE void widen_with(Load load, int n, float* to, const float* minus) {
  if (minus != nullptr) {
    for (int i = 0; i < n; i += kLanes) {
      store_bits(to + i, (U)(load(i) - (F)load_bits(minus + i)));
    }
  } else {
    for (int i = 0; i < n; i += kLanes) store_bits(to + i, (U)load(i));
  }
}

// Converts n elements of any dtype to floats, in order, minus `minus` if given. n must be a
// multiple of kLanes.
inline void widen(Dtype dtype, const char* from, int n, float* to, const float* minus = nullptr) {
  if (dtype == Dtype::kF32) {
    widen_with([&](int i) { return (F)load_bits(from + 4 * i); }, n, to, minus);
  } else if (dtype == Dtype::kF16) {
    widen_with([&](int i) { return load_f16(from + 2 * i); }, n, to, minus);
  } else if (dtype == Dtype::kBF16) {
    const auto load = [&](int i) {
      Halves halves;
      std::memcpy(&halves, from + 2 * i, sizeof(halves));
      return (F)(__builtin_convertvector(halves, U) << 16);
    };
    widen_with(load, n, to, minus);
  } else {
    for (int i = 0; i < n; ++i) {
      double value;
      std::memcpy(&value, from + 8 * i, 8);
      to[i] = static_cast<float>(value) - (minus != nullptr ? minus[i] : 0.0f);
    }
  }
}

// Converts n floats to elements of any dtype. n must be a multiple of kLanes.
inline void narrow(const float* from, int n, Dtype dtype, char* to) {
  if (dtype == Dtype::kF32) {
    std::memcpy(to, from, 4 * static_cast<size_t>(n));
  } else if (dtype == Dtype::kF16) {
    for (int i = 0; i < n; i += kLanes) store_f16(to + 2 * i, (F)load_bits(from + i));
  } else if (dtype == Dtype::kBF16) {
    for (int i = 0; i < n; i += kLanes) {
      const U halves = round_bf16<false>((F)load_bits(from + i)) >> 16;
      const Halves packed = __builtin_convertvector(halves, Halves);
      std::memcpy(to + 2 * i, &packed, sizeof(packed));
    }
  } else {
    for (int i = 0; i < n; ++i) {
      const double value = from[i];
      std::memcpy(to + 8 * i, &value, 8);
    }
  }
}

// The same with doubles. `scratch` holds n floats.
inline void widen(Dtype dtype, const char* from, int n, double* to, float* scratch) {
  if (dtype == Dtype::kF64) {
    std::memcpy(to, from, 8 * static_cast<size_t>(n));
    return;
  }
  widen(dtype, from, n, scratch);
  for (int i = 0; i < n; ++i) to[i] = scratch[i];
}

inline void narrow(const double* from, int n, Dtype dtype, char* to, float* scratch) {
  if (dtype == Dtype::kF64) {
    std::memcpy(to, from, 8 * static_cast<size_t>(n));
    return;
  }
  for (int i = 0; i < n; ++i) scratch[i] = static_cast<float>(from[i]);
  narrow(scratch, n, dtype, to);
}

}  // namespace
}  // namespace pymerge
