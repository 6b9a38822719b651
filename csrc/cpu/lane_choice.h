// Lanes that each choose one of up to four models: bit i of a lane's integer stands for model i.
#pragma once

#include "cpu/simd.h"

namespace pymerge {
namespace {

#if defined(__AVX2__)
constexpr bool kLookUps = true;
#else
constexpr bool kLookUps = false;  // there is no permutation by variable lane indices
#endif

// Adds `bits` to the bits already set, in the lanes of a mask.
PM_INLINE I with_bits(I chosen, int bits, FloatMasks::Mask mask) {
#if defined(__AVX512F__)
  return (I)_mm512_mask_or_epi32((__m512i)chosen, mask, (__m512i)chosen, _mm512_set1_epi32(bits));
#else
  return chosen | (mask & bits);
#endif
}

// a in the lanes of a mask, else b.
PM_INLINE F where(FloatMasks::Mask mask, F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_mask_mov_ps((__m512)b, mask, (__m512)a);
#else
  return mask ? a : b;
#endif
}

// a where a lane has the bit, else b.
PM_INLINE F where_bit(I chosen, int bit, F a, F b) {
#if defined(__AVX512F__)
  const __mmask16 has = _mm512_test_epi32_mask((__m512i)chosen, _mm512_set1_epi32(bit));
  return (F)_mm512_mask_mov_ps((__m512)b, has, (__m512)a);
#else
  return (chosen & bit) != 0 ? a : b;
#endif
}

// Lanes that have one bit or none.
PM_INLINE FloatMasks::Mask one_bit(I chosen) {
#if defined(__AVX512F__)
  const __m512i less = _mm512_sub_epi32((__m512i)chosen, _mm512_set1_epi32(1));
  return _mm512_testn_epi32_mask((__m512i)chosen, less);
#else
  return (chosen & (chosen - 1)) == 0;
#endif
}

// Picks from K vectors, in each lane, the value of its model.
template <int K>
PM_INLINE F of_model(const F (&values)[K], I chosen) {
  F found = values[K - 1];
  PM_UNROLL
  for (int j = 0; j < K - 1; ++j) found = where_bit(chosen, 1 << j, values[j], found);
  return found;
}

// A table with one number for each model, from which each lane takes the number of its only bit. A
// lane with no bit or several gets any number, or 0.
struct ModelTable {
#if defined(__AVX512F__)
  static constexpr int kPlaces = 16;
  static int place(int model) { return 1 << model; }
#else
  static constexpr int kPlaces = 4;
  static int place(int model) { return (model + 3) % 4; }
#endif
  alignas(64) float numbers[kPlaces] = {};

  void set(int model, float number) { numbers[place(model)] = number; }
};

// The table index of each lane.
PM_INLINE I table_places(I chosen) {
#if defined(__AVX512F__)
  return chosen;
#else
  // In a float 2^m, the lowest bits of the exponent are m + 3 modulo 4.
  return (I)((U) __builtin_convertvector(chosen, F) >> 23);
#endif
}

PM_INLINE F look_up(const ModelTable& table, I places) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps((__m512i)places, _mm512_load_ps(table.numbers));
#elif defined(__AVX2__)
  const __m256 numbers = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(table.numbers));
  return (F)_mm256_permutevar_ps(numbers, (__m256i)places);
#else
  F found{};
  for (int i = 0; i < kLanes; ++i) found[i] = table.numbers[places[i] & 3];
  return found;
#endif
}

// The low halves of one vector and the high halves of another.
PM_INLINE U halves_of(U low, U high) {
#if defined(__AVX512F__)
  return (U)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
  return (U)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#else
  return (low & 0xffffu) | (high & 0xffff0000u);
#endif
}

// `size` with the sign of x, for size >= 0.
PM_INLINE F with_sign(F x, F size) { return (F)((U)size | ((U)x & 0x80000000u)); }

// x with its magnitude limited to at most `most`; NaN becomes any number.
PM_INLINE F not_beyond(F x, F most) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)most, 2);
#else
  return Traits<F>::smaller(most, Traits<F>::larger(-most, x));
#endif
}

// x with its magnitude raised to at least `least`; NaN becomes any number.
PM_INLINE F not_within(F x, F least) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)least, 3);
#else
  return with_sign(x, Traits<F>::larger(least, bit_cast<F>(magnitude_key(x))));
#endif
}

}  // namespace
}  // namespace pymerge
