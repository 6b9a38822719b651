// Packs the chosen lanes of vectors next to each other, and unpacks them: one version for few
// lanes, and a branch-free one for any number of them.
#pragma once

#include "cpu/simd.h"

namespace pymerge {
namespace {

#if defined(__AVX512F__)
// Moves the chosen lanes to the front and fills up with zeros. On Zen 4 the instruction waits for
// the old contents of its destination even where it keeps none of them. The inline assembly
// therefore makes fresh zeros each time, in a way that the compiler cannot see through.
PM_INLINE I compressed(I values, __mmask16 mask) {
  __m512i zeros;
  __asm__("vpxord %0, %0, %0" : "=v"(zeros));
  return (I)_mm512_mask_compress_epi32(zeros, mask, (__m512i)values);
}
#endif

// Writes the lanes of `values` that the mask chooses to `to`, which has room for a whole vector, in
// any order; returns their number.
PM_INLINE int compress(int32_t* to, I values, FloatMasks::Mask mask) {
#if defined(__AVX512F__)
  store_bits(to, (U)compressed(values, mask));
  return __builtin_popcount(mask);
#else
  uint32_t chosen = lane_bits(mask);
  if (__builtin_expect(chosen == 0, 1)) return 0;
  alignas(PM_VECTOR_BYTES) int32_t lanes[kLanes];
  store_bits(lanes, (U)values);
  int count = 0;
  do {
    to[count++] = lanes[__builtin_ctz(chosen)];
    chosen &= chosen - 1;
  } while (chosen != 0);
  return count;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each choice of 8 lanes, one byte for each place: the lane that moves there, or, in the other
// direction, the place that the lane comes from.
struct LaneTable {
  uint64_t pack[256], unpack[256];
};

constexpr LaneTable lane_table() {
  LaneTable table{};
  for (int chosen = 0; chosen < 256; ++chosen) {
    uint64_t count = 0;
    for (uint64_t lane = 0; lane < 8; ++lane) {
      table.unpack[chosen] |= (count < 8 ? count : 7) << 8 * lane;
      if ((chosen >> lane & 1) != 0) table.pack[chosen] |= lane << 8 * count++;
    }
  }
  return table;
}

constexpr LaneTable kLaneTable = lane_table();

PM_INLINE F permuted(F values, const uint64_t& order) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&order));
  return (F)_mm256_permutevar8x32_ps((__m256)values, _mm256_cvtepu8_epi32(bytes));
}
#endif

// Writes the chosen lanes to `to`, which has room for a whole vector.
PM_INLINE void pack(float* to, F values, uint32_t chosen) {
#if defined(__AVX512F__)
  // In a register: storing its lanes directly is slow on some processors.
  store_bits(to, (U)compressed((I)values, static_cast<__mmask16>(chosen)));
#elif defined(__AVX2__)
  store_bits(to, (U)permuted(values, kLaneTable.pack[chosen]));
#else
  alignas(PM_VECTOR_BYTES) float lanes[kLanes];
  store_bits(lanes, (U)values);
  for (int i = 0; i < kLanes; ++i) {
    *to = lanes[i];
    to += chosen >> i & 1;
  }
#endif
}

// Fills the chosen lanes with the first values of `from` and the rest from `others`; a whole vector
// must be readable at `from`.
PM_INLINE F unpack(const float* from, uint32_t chosen, F others) {
#if defined(__AVX512F__)
  return (F)_mm512_mask_expand_ps((__m512)others, static_cast<__mmask16>(chosen),
                                  _mm512_loadu_ps(from));
#elif defined(__AVX2__)
  const I bit = I{1, 2, 4, 8, 16, 32, 64, 128};
  const I here = ((I{} + static_cast<int32_t>(chosen)) & bit) == bit;
  return here ? permuted((F)load_bits(from), kLaneTable.unpack[chosen]) : others;
#else
  alignas(PM_VECTOR_BYTES) float lanes[kLanes];
  store_bits(lanes, (U)others);
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t here = chosen >> i & 1;
    lanes[i] = here != 0 ? *from : lanes[i];
    from += here;
  }
  return (F)load_bits(lanes);
#endif
}

}  // namespace
}  // namespace pymerge
