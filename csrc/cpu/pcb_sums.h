// The sums and extremes of pair products that the paper's PCB-Merging needs, chunk by chunk
// (kernels_sums.h).
#pragma once

#include "cpu/sum_lanes.h"
#include "math/functions.h"

namespace pymerge {
namespace {

// sum_in_lanes (kernels_sums.h) for numbers that are not negative.
inline double sum_positive(const float* values) {
  constexpr int kParts = kSumLanes / kDLanes;
  D lanes[kParts] = {};
  for (int i = 0; i < kSumChunk; i += kSumLanes) {
#pragma GCC unroll 8
    for (int part = 0; part < kParts; ++part) {
      lanes[part] = lanes[part] + load_doubles(values + i + part * kDLanes);
    }
  }
  double total = 0;
  for (int i = 0; i < kSumLanes; ++i) total += lanes[i / kDLanes][i % kDLanes];
  return total;
}

// Smallest and largest of n products.
inline void product_extremes(const float* a, const float* b, int n, double* found) {
  F least = F{} + __builtin_inff(), most = -least;
  const auto look = [&](F product) {
    // NaN and infinity are left out: they must not spoil the finite values. x - x is 0 only for
    // finite x, and of NaN and another number these functions return the second argument.
    const F clean = product + (product - product);
    least = Traits<F>::smaller(clean, least);
    most = Traits<F>::larger(clean, most);
  };
  const int whole = n / kLanes * kLanes;
  for (int e = 0; e < whole; e += kLanes) look((F)load_bits(a + e) * (F)load_bits(b + e));
  for (int e = whole; e < n; ++e) look(F{} + a[e] * b[e]);
  found[0] = least[0];
  found[1] = most[0];
  for (int i = 1; i < kLanes; ++i) {
    found[0] = least[i] < found[0] ? least[i] : found[0];
    found[1] = most[i] > found[1] ? most[i] : found[1];
  }
  found[0] += 0.0;  // no -0, which has no order
  found[1] += 0.0;
}

// Products of all pairs over n elements: extremes, or sums of exp of the scaled products.
inline void pcb_chunk(const SumsArgs& args, const float* values, int n, float* room,
                      double* found) {
  constexpr int kWidth = 4 * kLanes;
  static_assert(kSumChunk % kWidth == 0, "whole steps");
  const int count = args.num_models;
  const int pairs = count * (count + 1) / 2;
  int row = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = i; j < count; ++j, ++row) {
      const float* a = values + static_cast<int64_t>(i) * kSumChunk;
      const float* b = values + static_cast<int64_t>(j) * kSumChunk;
      if (args.kind == SumsKind::kPcbExtremes) {
        product_extremes(a, b, n, found + 2 * row);
        continue;
      }
      const F low = F{} + static_cast<float>(args.reals[row]);
      const F inverse = F{} + static_cast<float>(args.reals[pairs + row]);
      for (int again = 0; again <= (i == j ? 1 : 0); ++again) {
        const F many = F{} + (again == 1 ? static_cast<float>(count) : 1.0f);
        for (int e = 0; e < kSumChunk; e += kWidth) {
          F x[4];
          for (int v = 0; v < 4; ++v) {
            const int at = e + v * kLanes;
            x[v] = many * (((F)load_bits(a + at) * (F)load_bits(b + at) - low) * inverse);
          }
          exp32_of<4>(x);
          for (int v = 0; v < 4; ++v) {
            store_bits(room + e + v * kLanes, (U)(x[v] == x[v] ? x[v] : F{}));
          }
        }
        for (int e = n; e < kSumChunk; ++e) room[e] = 0;
        found[again == 1 ? pairs + i : row] = sum_positive(room);
      }
    }
  }
}

}  // namespace
}  // namespace pymerge
