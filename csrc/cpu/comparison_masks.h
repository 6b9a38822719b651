// Bit masks of a chunk of task vectors (bit i: element i), and the counts made with them.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/sum_lanes.h"

namespace pymerge {
namespace {

constexpr int kBitWords = kSumChunk / 64;

using W = PM_VECTOR(uint64_t);

PM_INLINE W load_words(const uint64_t* p) { return (W)load_bits(p); }

// Writes the mask of the kLanes elements from the i-th on.
PM_INLINE void put_mask(uint64_t* words, int i, FloatMasks::Mask mask) {
  const uint32_t bits = lane_bits(mask);
  if constexpr (kLanes == 16) {
    const auto own = static_cast<uint16_t>(bits);
    std::memcpy(reinterpret_cast<char*>(words) + static_cast<unsigned>(i) / 8, &own, sizeof(own));
  } else if constexpr (kLanes == 8) {
    reinterpret_cast<unsigned char*>(words)[i / 8] = static_cast<unsigned char>(bits);
  } else {
    uint64_t& word = words[i / 64];
    word = (i % 64 == 0 ? 0 : word) | static_cast<uint64_t>(bits) << (i % 64);
  }
}

// Sums of magnitudes and squares have two levels: kSumGroup steps of all lanes are summed in the
// compute type, and these partial sums in doubles.
constexpr int kSumGroup = 8;

// Adds a vector of kLanes floats to kLanes doubles.
PM_INLINE void add_halves(D* sums, F x) {
  alignas(PM_VECTOR_BYTES) float lanes[kLanes];
  store_bits(lanes, (U)x);
  sums[0] += load_doubles(lanes);
  sums[1] += load_doubles(lanes + kDLanes);
}

// The data that a thread reads next. It is prefetched step by step: memory serves only so many
// requests at once, and a burst of them stalls (1.4x the time with 4 models in bf16).
struct Ahead {
  const char* data;
  int bytes;  // of an element
};

// For a chunk of a task vector, makes masks of the elements below 0 (if kFirst) and of those at or
// above each threshold. found: the sums of squares at or above each threshold; if kFirst, found[0]
// is the sum of magnitudes instead.
template <int kLevels, bool kFirst>
void masks_and_sums(const float* values, const int32_t* thresholds, uint64_t* negative,
                    uint64_t* kept, double* found, Ahead ahead) {
  using T = Traits<F>;
  constexpr int kSkipped = kFirst ? 1 : 0, kSums = kLevels;  // a sum of magnitudes for the first
  double lanes[kSums][kSumLanes];
  I least[kLevels];
  for (int level = 0; level < kLevels; ++level) least[level] = I{} + thresholds[level];
  for (int part = 0; part < kSumLanes; part += kLanes) {
    D sums[kSums][2] = {};
    for (int begin = part; begin < kSumChunk; begin += kSumGroup * kSumLanes) {
      F group[kSums] = {};
      for (int i = begin; i < begin + kSumGroup * kSumLanes; i += kSumLanes) {
        if (kFirst) __builtin_prefetch(ahead.data + i * ahead.bytes);
        const F x = (F)load_bits(values + i);
        const I key = magnitude_key(x);
        const F square = x * x;
        if constexpr (kFirst) {
          put_mask(negative, i, T::greater(F{}, x));
          group[0] += (F)key;
        }
#pragma GCC unroll 4
        for (int level = 0; level < kLevels; ++level) {
          const auto mask = T::at_least(key, least[level]);
          put_mask(kept + level * kBitWords, i, mask);
          if (level >= kSkipped) group[level] = T::add(group[level], square, mask);
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) add_halves(sums[s], group[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      store_bits(lanes[s] + part, (U)sums[s][0]);
      store_bits(lanes[s] + part + kDLanes, (U)sums[s][1]);
    }
  }
  for (int s = 0; s < kSums; ++s) found[s] = add_lanes(lanes[s]);
}

// negative[kBitWords], kept[levels][kBitWords] of one model; found[levels]: the sum of magnitudes,
// then of squares at or above the second threshold and those after it.
void all_masks(const float* values, const int32_t* thresholds, int levels, uint64_t* negative,
               uint64_t* kept, double* found, Ahead ahead) {
  int level = levels >= 4 ? 4 : levels;
  if (level == 4) masks_and_sums<4, true>(values, thresholds, negative, kept, found, ahead);
  if (level == 3) masks_and_sums<3, true>(values, thresholds, negative, kept, found, ahead);
  if (level == 2) masks_and_sums<2, true>(values, thresholds, negative, kept, found, ahead);
  if (level == 1) masks_and_sums<1, true>(values, thresholds, negative, kept, found, ahead);
  for (; level < levels; ++level) {
    masks_and_sums<1, false>(values, thresholds + level, negative, kept + level * kBitWords,
                             found + level, ahead);
  }
}

// The scalar counterpart of the vector loops over floats, one element at a time: add(i, group) adds
// element i's terms to the group's sums.
template <int kCount, class V, class Step>
void grouped_sums(Step step, double* found) {
  double lanes[kCount][kSumLanes] = {};
  for (int lane = 0; lane < kSumLanes; ++lane) {
    for (int begin = lane; begin < kSumChunk; begin += kSumGroup * kSumLanes) {
      V group[kCount] = {};
      for (int i = begin; i < begin + kSumGroup * kSumLanes; i += kSumLanes) step(i, group);
      for (int s = 0; s < kCount; ++s) lanes[s][lane] += group[s];
    }
  }
  for (int s = 0; s < kCount; ++s) found[s] = add_lanes(lanes[s]);
}

void all_masks(const double* values, const int64_t* thresholds, int levels, uint64_t* negative,
               uint64_t* kept, double* found, Ahead) {
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
  const auto magnitude = [&](int i, double* group) {
    group[0] += values[i] < 0 ? -values[i] : values[i];
  };
  grouped_sums<1, double>(magnitude, found);
  for (int level = 1; level < levels; ++level) {
    const uint64_t* mask = kept + level * kBitWords;
    const auto square = [&](int i, double* group) {
      if ((mask[i / 64] >> (i % 64) & 1) != 0) group[0] += values[i] * values[i];
    };
    grouped_sums<1, double>(square, found + level);
  }
}

constexpr int kMostCompared = 64;  // models
constexpr int kPlanes = 7;         // bits of a number of models

// Adds a mask to counters in bit planes: plane j has bit j of the number of masks set at each
// place.
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

int64_t level_width(int64_t models) {
  int64_t splits = 0;
  for (int64_t n = 1; n <= models; ++n) splits += n / 2 + 1;
  return models + models * (models - 1) + splits;
}

#define PM_FAST_ONES 0
#include "cpu/comparison_counts.h"
#undef PM_FAST_ONES

#if defined(__AVX512F__) && defined(__x86_64__)
// Newer processors count the bits of whole vectors. Both versions give the same numbers.
#pragma GCC push_options
#pragma GCC target("avx512vpopcntdq")
#define PM_FAST_ONES 1
#include "cpu/comparison_counts.h"
#undef PM_FAST_ONES
#pragma GCC pop_options

bool has_fast_ones() { return __builtin_cpu_supports("avx512vpopcntdq") != 0; }
#endif

void count_level(int models, const uint64_t* negative, const uint64_t* kept, int64_t stride,
                 W* counts) {
#if defined(__AVX512F__) && defined(__x86_64__)
  static const bool fast = has_fast_ones();
  if (fast) return fast_ones::count_level(models, negative, kept, stride, counts);
#endif
  plain_ones::count_level(models, negative, kept, stride, counts);
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
