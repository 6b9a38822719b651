// Bit masks of a chunk of task vectors (bit i: element i), and what is counted with them.
#pragma once

#include "cpu/elementwise.h"

namespace pymerge {
namespace {

constexpr int kBitWords = kSumChunk / 64;

using W = PM_VECTOR(uint64_t);

PM_INLINE W load_words(const uint64_t* p) { return (W)load_bits(p); }

PM_INLINE int64_t ones(W words) {
  alignas(PM_VECTOR_BYTES) uint64_t lanes[PM_VECTOR_BYTES / 8];
  store_bits(lanes, (U)words);
  int64_t total = 0;
  for (uint64_t lane : lanes) total += __builtin_popcountll(lane);
  return total;
}

// Writes the mask of the kLanes elements from the i-th on.
PM_INLINE void put_mask(uint64_t* words, int i, FloatMasks::Mask mask) {
  const uint32_t bits = lane_bits(mask);
  if constexpr (kLanes == 16) {
    const auto own = static_cast<uint16_t>(bits);
    std::memcpy(reinterpret_cast<char*>(words) + i / 8, &own, sizeof(own));
  } else if constexpr (kLanes == 8) {
    reinterpret_cast<unsigned char*>(words)[i / 8] = static_cast<unsigned char>(bits);
  } else {
    uint64_t& word = words[i / 64];
    word = (i % 64 == 0 ? 0 : word) | static_cast<uint64_t>(bits) << (i % 64);
  }
}

// What of a chunk is below 0 (where kSign), and what is at or above each threshold.
template <int kLevels, bool kSign>
void write_masks(const float* values, const int32_t* thresholds, uint64_t* negative,
                 uint64_t* kept) {
  using T = Traits<F>;
  for (int i = 0; i < kSumChunk; i += kLanes) {
    const F x = (F)load_bits(values + i);
    const I key = magnitude_key(x);
    if constexpr (kSign) put_mask(negative, i, T::greater(F{}, x));
#pragma GCC unroll 4
    for (int level = 0; level < kLevels; ++level) {
      put_mask(kept + level * kBitWords, i, T::at_least(key, I{} + thresholds[level]));
    }
  }
}

// negative[kBitWords], kept[levels][kBitWords] of one model.
void all_masks(const float* values, const int32_t* thresholds, int levels, uint64_t* negative,
               uint64_t* kept) {
  int level = 0;
  if (levels >= 4) {
    write_masks<4, true>(values, thresholds, negative, kept);
    level = 4;
  } else {
    write_masks<1, true>(values, thresholds, negative, kept);
    level = 1;
  }
  for (; level + 3 <= levels; level += 3) {
    write_masks<3, false>(values, thresholds + level, negative, kept + level * kBitWords);
  }
  for (; level < levels; ++level) {
    write_masks<1, false>(values, thresholds + level, negative, kept + level * kBitWords);
  }
}

void all_masks(const double* values, const int64_t* thresholds, int levels, uint64_t* negative,
               uint64_t* kept) {
  std::memset(negative, 0, kBitWords * 8);
  std::memset(kept, 0, static_cast<size_t>(levels) * kBitWords * 8);
  for (int i = 0; i < kSumChunk; ++i) {
    const uint64_t bit = uint64_t{1} << (i % 64);
    const int64_t key = scalar_key(values[i]);
    if (values[i] < 0) negative[i / 64] |= bit;
    for (int level = 0; level < levels; ++level) {
      if (key >= thresholds[level]) kept[level * kBitWords + i / 64] |= bit;
    }
  }
}

constexpr int kMostCompared = 64;  // models
constexpr int kPlanes = 7;         // bits of a number of models

// How many of the masks of `count` models are set at each place, as bits of a number.
PM_INLINE void add_planes(W* planes, int used, W carry) {
  for (int j = 0; j < used; ++j) {
    const W both = planes[j] & carry;
    planes[j] ^= carry;
    carry = both;
  }
}

PM_INLINE W where_number(const W* planes, int used, int number) {
  W all = ~W{};
  for (int j = 0; j < used; ++j) all &= (number >> j & 1) != 0 ? planes[j] : ~planes[j];
  return all;
}

constexpr int planes_of(int models) { return models < 2 ? 1 : 1 + planes_of(models / 2); }

// Counts of one level, added to counts: kept[K], pairs i < j: kept by both, of these with opposite
// signs; then, for n = 1 .. K kept at a place and m = 0 .. n / 2, places where m have one sign and
// n - m the other. Masks of models are `stride` words apart. kCount: K, or 0 if only known here.
template <int kCount>
void count_level(int models, const uint64_t* negative, const uint64_t* kept, int64_t stride,
                 int64_t* counts) {
  constexpr int kRoom = kCount > 0 ? kCount : kMostCompared;
  constexpr int kVector = PM_VECTOR_BYTES / 8;
  const int count = kCount > 0 ? kCount : models;
  const int used = planes_of(count);
  for (int at = 0; at < kBitWords; at += kVector) {
    W own[kRoom], sign[kRoom];
    W more[kPlanes] = {}, less[kPlanes] = {};
    int64_t* found = counts;
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) {
      own[k] = load_words(kept + k * stride + at);
      sign[k] = load_words(negative + k * stride + at);
      *found++ += ones(own[k]);
      add_planes(more, used, own[k] & ~sign[k]);
      add_planes(less, used, own[k] & sign[k]);
    }
    const int pairs = count * (count - 1) / 2;
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int j = i + 1; j < count; ++j, ++found) {
        const W both = own[i] & own[j];
        found[0] += ones(both);
        found[pairs] += ones(both & (sign[i] ^ sign[j]));
      }
    }
    found += pairs;
    W of_more[kRoom + 1], of_less[kRoom + 1];
#pragma GCC unroll 5
    for (int n = 0; n <= count; ++n) {
      of_more[n] = where_number(more, used, n);
      of_less[n] = where_number(less, used, n);
    }
#pragma GCC unroll 5
    for (int n = 1; n <= count; ++n) {
#pragma GCC unroll 5
      for (int m = 0; m <= n / 2; ++m) {
        *found++ += ones((of_more[m] & of_less[n - m]) | (of_more[n - m] & of_less[m]));
      }
    }
  }
}

int64_t level_width(int64_t models) {
  int64_t splits = 0;
  for (int64_t n = 1; n <= models; ++n) splits += n / 2 + 1;
  return models + models * (models - 1) + splits;
}

void count_level(int models, const uint64_t* negative, const uint64_t* kept, int64_t stride,
                 int64_t* counts) {
  if (models == 2) return count_level<2>(models, negative, kept, stride, counts);
  if (models == 3) return count_level<3>(models, negative, kept, stride, counts);
  if (models == 4) return count_level<4>(models, negative, kept, stride, counts);
  count_level<0>(models, negative, kept, stride, counts);
}

// 16-bit and 32-bit elements of a chunk as integers, -0 as 0.
template <int kBytes>
struct Bits;

template <>
struct Bits<2> {
  using Vector = PM_VECTOR(int16_t);
  static constexpr int kLength = PM_VECTOR_BYTES / 2;
  PM_INLINE Vector load(const char* p) {
    const Vector x = (Vector)load_bits(p);
#if defined(__AVX512BW__)
    const __mmask32 zero = _mm512_testn_epi16_mask((__m512i)x, _mm512_set1_epi16(0x7fff));
    return (Vector)_mm512_maskz_mov_epi16(~zero, (__m512i)x);
#else
    return x & ~(Vector)((x & 0x7fff) == 0);
#endif
  }
  PM_INLINE Vector count(Vector counts, Vector a, Vector b) {
#if defined(__AVX512BW__)
    return (Vector)_mm512_mask_sub_epi16((__m512i)counts,
                                         _mm512_cmpeq_epi16_mask((__m512i)a, (__m512i)b),
                                         (__m512i)counts, _mm512_set1_epi16(-1));
#else
    return counts - (Vector)(a == b);
#endif
  }
};

template <>
struct Bits<4> {
  using Vector = I;
  static constexpr int kLength = kLanes;
  PM_INLINE Vector load(const char* p) {
    const F x = (F)load_bits(p);
    return (I)(x + F{});  // -0 + 0 = 0
  }
  PM_INLINE Vector count(Vector counts, Vector a, Vector b) {
    return FloatMasks::count(counts, Traits<F>::equal(a, b));
  }
};

// Counts where models i < j are equal, in a whole chunk whose inputs have elements of kBytes.
template <int kBytes, int kCount>
void count_equal(const Operand* models, int64_t at, int count, int64_t* counts) {
  using B = Bits<kBytes>;
  constexpr int kPairs = kCount * (kCount - 1) / 2;
  (void)count;
  typename B::Vector found[kPairs] = {};
  for (int i = 0; i < kSumChunk; i += B::kLength) {
    typename B::Vector x[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      x[k] = B::load(static_cast<const char*>(models[k].data) + (at + i) * kBytes);
    }
    int pair = 0;
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 4
      for (int j = k + 1; j < kCount; ++j, ++pair) {
        found[pair] = B::count(found[pair], x[k], x[j]);
      }
    }
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int lane = 0; lane < B::kLength; ++lane) counts[pair] += found[pair][lane];
  }
}

template <int kBytes>
void count_equal(const Operand* models, int64_t at, int count, int64_t* counts) {
  if (count == 2) return count_equal<kBytes, 2>(models, at, count, counts);
  if (count == 3) return count_equal<kBytes, 3>(models, at, count, counts);
  if (count == 4) return count_equal<kBytes, 4>(models, at, count, counts);
  for (int i = 0; i < count; ++i) {
    for (int j = i + 1; j < count; ++j, ++counts) {
      const Operand pair[2] = {models[i], models[j]};
      count_equal<kBytes, 2>(pair, at, 2, counts);
    }
  }
}

}  // namespace
}  // namespace pymerge
