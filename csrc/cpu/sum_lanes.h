// Building blocks of the sums over a chunk: vectors of its lanes, and products added to them.
#pragma once

#include "cpu/simd.h"

namespace pymerge {
namespace {

constexpr int kSumLanes = 16;

using Floats = float __attribute__((vector_size(PM_VECTOR_BYTES / 2)));  // kDLanes of them

PM_INLINE D load_doubles(const double* p) { return (D)load_bits(p); }

// sum + a b. The product of two floats is exact in a double, so one fused operation, which rounds
// once, gives the same bits as two.
template <class V>
PM_INLINE D add_product(D sum, D a, D b) {
#if defined(__AVX512F__)
  if (sizeof(V) == 4) return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__FMA__)
  if (sizeof(V) == 4) return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#endif
  return sum + a * b;
}

PM_INLINE double add_lanes(const double* lanes) {
  double total = 0;
  for (int i = 0; i < kSumLanes; ++i) total += lanes[i];
  return total;
}

// Computes kCount sums over kSumChunk elements at once; step(i, sums) adds the terms of the kDLanes
// elements from the i-th on. It takes one vector of lanes at a time, so that all sums stay in
// registers.
template <int kCount, class Step>
PM_INLINE void lane_sums(Step step, double* found) {
  double lanes[kCount][kSumLanes];
  for (int part = 0; part < kSumLanes; part += kDLanes) {
    D sums[kCount] = {};
    for (int i = part; i < kSumChunk; i += kSumLanes) step(i, sums);
#pragma GCC unroll 16
    for (int c = 0; c < kCount; ++c) store_bits(lanes[c] + part, (U)sums[c]);
  }
  for (int c = 0; c < kCount; ++c) found[c] = add_lanes(lanes[c]);
}

PM_INLINE D absolute_of(D x) { return (D)((L)x & INT64_MAX); }

template <class V>
double sum_in_lanes(const V* values) {
  double total;
  lane_sums<1>(
      [&](int i, D* sums)
          __attribute__((always_inline)) { sums[0] += absolute_of(load_doubles(values + i)); },
      &total);
  return total;
}

// Sums of a b_k for vectors b_k, kSumChunk elements apart.
template <int kCount, class V>
void dots_in_lanes(const V* a, const V* b, double* found) {
  lane_sums<kCount>(
      [&](int i, D* sums) __attribute__((always_inline)) {
        const D x = load_doubles(a + i);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
          sums[k] = add_product<V>(sums[k], x, load_doubles(b + k * kSumChunk + i));
        }
      },
      found);
}

template <class V>
void dots_in_lanes(const V* a, const V* b, int count, double* found) {
  while (count >= 4) {
    dots_in_lanes<4>(a, b, found);
    b += 4 * kSumChunk;
    found += 4;
    count -= 4;
  }
  if (count == 3) dots_in_lanes<3>(a, b, found);
  if (count == 2) dots_in_lanes<2>(a, b, found);
  if (count == 1) dots_in_lanes<1>(a, b, found);
}

// Sums of the products of all pairs i <= j of kCount vectors, row by row.
template <int kCount, class V>
void gram_in_lanes(const V* values, double* found) {
  lane_sums<kCount*(kCount + 1) / 2>(
      [&](int i, D* sums) __attribute__((always_inline)) {
        D x[kCount];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) x[k] = load_doubles(values + k * kSumChunk + i);
        int pair = 0;
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 4
          for (int j = k; j < kCount; ++j, ++pair) {
            sums[pair] = add_product<V>(sums[pair], x[k], x[j]);
          }
        }
      },
      found);
}

template <class V>
void gram_in_lanes(const V* values, int count, double* found) {
  if (count == 4) return gram_in_lanes<4>(values, found);
  if (count == 3) return gram_in_lanes<3>(values, found);
  if (count == 2) return gram_in_lanes<2>(values, found);
  for (int k = 0; k < count; ++k) {
    const V* own = values + static_cast<int64_t>(k) * kSumChunk;
    dots_in_lanes(own, own, count - k, found);
    found += count - k;
  }
}

template <class V>
double dot_in_lanes(const V* a, const V* b) {
  double total;
  dots_in_lanes<1>(a, b, &total);
  return total;
}

// The sum of magnitudes, and that of squares.
template <class V>
void norms_in_lanes(const V* values, double* found) {
  lane_sums<2>(
      [&](int i, D* sums) __attribute__((always_inline)) {
        const D x = load_doubles(values + i);
        sums[0] += absolute_of(x);
        sums[1] = add_product<V>(sums[1], x, x);
      },
      found);
}

// Smallest and largest of n values; NaN is left out.
template <class V>
void extremes_of(const V* values, int n, double* found) {
  V least = static_cast<V>(__builtin_inf()), most = -least;
  int i = 0;
  if constexpr (sizeof(V) == 4) {
    F low = F{} + least, high = F{} + most;
    for (; i + kLanes <= n; i += kLanes) {
      const F x = (F)load_bits(values + i);
      low = FloatMasks::smaller(x, low);
      high = FloatMasks::larger(x, high);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      least = low[lane] < least ? low[lane] : least;
      most = high[lane] > most ? high[lane] : most;
    }
  }
  for (; i < n; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  found[0] = least + 0.0;  // no -0, which has no order
  found[1] = most + 0.0;
}

}  // namespace
}  // namespace pymerge
