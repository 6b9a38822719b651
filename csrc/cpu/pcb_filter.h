// PCB-Merging: which elements may have a share above 0, told at a fraction of what scores cost.
//
// A share is above 0 where a score reaches its threshold q, which a tenth of the scores does. For
// an element that is filtered out, every model's score is proven to be below its q; whatever else
// is told costs time only. The bounds, in base-2 logarithms, with L(x) = bits(x) / 2^23 - 127, the
// logarithm drawn straight between powers of two: L(x) <= log2 x <= L(x) + 0.0861 for x > 0.
//
// kRoot, kVision   score = e^(K n^2) tanh(p) <= e^(K n^2) p where p > 0, and is not above 0
//                  otherwise. So score >= q needs L(p) + K n^2 log2 e >= log2 q - 0.0861. bits(p)
//                  of p < 0 is a negative integer, which is below every threshold. p is that of the
//                  score, bit for bit; kRoot takes |tau| inv for n, which is not less.
// kVisionEs        For 0 <= x <= m: t x <= tanh x <= x, t = tanh(m) / m. With A the sum of the
//                  n_j above 0 and B that of the others, sum_j tanh(n_i n_j) is at most
//                  n_i (A + t B) where n_i > 0, and n_i (B + t A) elsewhere. Then as above.
// kPaper           x_ij = c_ij + d_ij, d_ij = tau_i tau_j inv_ij. Z_ij = z_ij e^c_ij, S_i their
//                  sum. A logarithm lies below its tangent, here at S_i:
//                  log2 score <= log2(z_i S_i) + K log2 e (c_ii + d_ii)
//                                + sum_j Z_ij (e^d_ij - 1) / (S_i ln 2),
//                  and e^d - 1 <= d + 0.2975 |d| where |d| <= 1/2, and <= 1.7183 d where
//                  0 <= d <= 1. With u_i = tau_i sqrt(inv_ii), all b_ij = Z_ij inv_ij / (S_i ln 2
//                  sqrt(inv_ii inv_jj)) near their mean b, at most h away: the sum over j != i is
//                  at most b u_i (T - u_i) + (h + 0.2975 (b + h)) |u_i| (A - |u_i|), with T the
//                  sum of the u_j and A that of their magnitudes.
//
// Rounding of scores and bounds, at most 1e-4 of a logarithm, is covered by kSlack. Elements whose
// magnitudes are large, infinite or NaN are never filtered out.
#pragma once

#include <cmath>

#include "cpu/elementwise.h"
#include "math/pcb.h"

namespace pymerge {
namespace {

constexpr int kFilteredModels = 16;
constexpr double kSlack = 1.0 / 256;  // of a logarithm
constexpr double kChord = 0.08608;    // log2 x - L(x) is nowhere larger
constexpr double kLog2E = 1.4426950408889634;
constexpr double kExponent = 8388608.0;  // 2^23

struct PcbFilter {
  bool usable = false;
  float square[kFilteredModels];  // kPaper: factor of u^2; others: K n^2 log2 e / n^2, times 2^23
  float gain[kFilteredModels];    // kPaper: sqrt(inv_ii)
  float least[kFilteredModels];   // kPaper: the threshold
  int32_t key[kFilteredModels];   // others: the threshold, times 2^23
  float limit;                    // magnitudes are large from here on
  float slope, spread;            // kPaper: b, factor of A; kVisionEs: t, what rounding may add
};

inline bool in_range(double x, double low, double high) { return x >= low && x <= high; }

// Thresholds as logarithms. q is far from what is subnormal.
inline bool pcb_keys(const PcbCall& call, PcbFilter& filter) {
  for (int i = 0; i < call.num_models; ++i) {
    const double q = call.q[i];
    if (!in_range(q, 1e-30, 1e30)) return false;
    const double least = std::log2(q) + 127 - kChord - kSlack;
    filter.key[i] = static_cast<int32_t>(std::floor(least * kExponent));
  }
  return true;
}

inline bool pcb_codes_filter(const PcbCall& call, PcbFilter& filter) {
  const int count = call.num_models;
  double largest = 0;  // of n
  for (int i = 0; i < count; ++i) {
    const double lo = call.lo[i], hi = call.hi[i], inv = call.inv[i];
    if (!in_range(lo, 0, 1e15) || !in_range(hi, lo, 1e15) || !in_range(inv, 0, 1e30)) return false;
    // Below q a share is (q - q) times the inverse: +0.
    if (!in_range(call.top_inv[i], 1e-38, 3e38) || !(call.top[i] >= call.q[i])) return false;
    largest = std::fmax(largest, (hi - lo) * inv * (1 + 1e-6));
    // Not 0, so that the sum of y limits every tau. (1 + 1e-6): for the rounding to floats.
    const double n2 = call.variant == PcbVariant::kRoot ? std::fmax(inv * inv, 1e-20) : 1;
    if (!(n2 < 1e28)) return false;
    filter.square[i] = static_cast<float>(count * kLog2E * n2 * kExponent * (1 + 1e-6));
  }
  // So that a logarithm of p, at most 2^80, and K n^2 log2 e fit the exponent of a float.
  const double most = 46;
  if (!(count * kLog2E * largest * largest <= most)) return false;
  filter.limit = call.variant == PcbVariant::kRoot ? static_cast<float>(most * kExponent) : 1e20f;
  const double m = largest * largest;
  filter.slope = m < 1e-3 ? 0.999f : static_cast<float>(std::tanh(m) / m * (1 - 1e-6));
  filter.spread = static_cast<float>(count * (count + 4) * (1 + m) * 1e-6);
  return pcb_keys(call, filter);
}

inline bool pcb_paper_filter(const PcbCall& call, PcbFilter& filter) {
  const int count = call.num_models;
  double logarithm[kFilteredModels], least = HUGE_VAL, most = 0, cross = 0;
  double own[kFilteredModels];
  for (int i = 0; i < count; ++i) {
    const int pair = pcb_pair(i, i, count);
    const double inv = call.pair_inv[pair], centre = -call.pair_min[pair] * inv;
    if (!in_range(inv, 1e-28, 1e28) || !in_range(count * centre, -40, 40)) return false;
    if (!in_range(call.norm[i], 1e-12, 1e12) || !in_range(call.q[i], 1e-30, 1e30)) return false;
    filter.gain[i] = static_cast<float>(std::sqrt(inv));
    logarithm[i] = std::log2(call.norm[i]) + count * kLog2E * centre;
  }
  for (int i = 0; i < count; ++i) {
    double sum = 0;
    for (int j = 0; j < count; ++j) {
      const int pair = pcb_pair(i, j, count);
      const double inv = call.pair_inv[pair], centre = -call.pair_min[pair] * inv;
      const double z = call.pair_norm[pair];
      if (!in_range(inv, 0, 1e28) || !in_range(centre, -40, 40) || !in_range(z, 1e-12, 1e12)) {
        return false;
      }
      sum += z * std::exp(centre);
    }
    for (int j = 0; j < count; ++j) {
      const int pair = pcb_pair(i, j, count);
      const double inv = call.pair_inv[pair], z = call.pair_norm[pair];
      const double gain = static_cast<double>(filter.gain[i]) * filter.gain[j];
      const double factor =
          z * std::exp(-call.pair_min[pair] * inv) * inv / (sum * std::log(2.0) * gain);
      if (i == j) {
        own[i] = factor * 1.7183;
      } else {
        least = std::fmin(least, factor);
        most = std::fmax(most, factor);
        cross = std::fmax(cross, inv / gain);
      }
    }
    logarithm[i] += std::log2(sum);
  }
  // |d_ij| <= cross A^2 / 4: two magnitudes that add up to A.
  double slope = 0, spread = 0, limit = 1e3;
  if (count > 1) {
    slope = (least + most) / 2;
    spread = (most - least) / 2 + 0.2975 * most;
    limit = std::fmin(limit, std::sqrt(2 / std::fmax(cross, 1e-12)) * (1 - 1e-6));
  }
  for (int i = 0; i < count; ++i) {
    const double square = count * kLog2E + own[i] - slope - spread;
    const double q = std::log2(static_cast<double>(call.q[i])) - logarithm[i] - kSlack;
    // Where d_ii > 1, what is told does not hold, but is above the threshold.
    if (!(square + 2 * slope - limit * std::fmax(slope - spread, 0) >= std::fmax(q + 0.1, 0.1))) {
      return false;
    }
    filter.square[i] = static_cast<float>(square);
    filter.least[i] = static_cast<float>(q);
  }
  filter.slope = static_cast<float>(slope);
  filter.spread = static_cast<float>(spread);
  filter.limit = static_cast<float>(limit);
  return true;
}

// What the filter needs to know of a call; not usable where its premises do not hold.
inline PcbFilter pcb_filter(const PcbCall& call) {
  PcbFilter filter;
  if (call.num_models > kFilteredModels || !in_range(call.scale, -1e30, 1e30)) return filter;
  // So that a weight times a magnitude is finite, and times a share of 0 is 0.
  for (int i = 0; i < call.num_models; ++i) {
    if (!in_range(call.weights[i], -1e15, 1e15)) return filter;
  }
  filter.usable = call.variant == PcbVariant::kPaper ? pcb_paper_filter(call, filter)
                                                     : pcb_codes_filter(call, filter);
  return filter;
}

// The elements that some model may have a share of.
template <PcbVariant kVariant, int K>
PM_INLINE FloatMasks::Mask pcb_survivors(const PcbFilter& filter, const PcbCall& call,
                                         const F* tau) {
  using T = Traits<F>;
  const int count = K > 0 ? K : call.num_models;
  F sizes{}, total{};
  F n[K > 0 ? K : kFilteredModels];
  if constexpr (kVariant == PcbVariant::kPaper) {
    PM_UNROLL
    for (int i = 0; i < count; ++i) {
      n[i] = tau[i] * splat<F>(filter.gain[i]);
      total = total + n[i];
      sizes = sizes + bit_cast<F>(magnitude_key(n[i]));
    }
    auto found = T::at_least(magnitude_key(sizes), splat_bits<F>(bit_cast<int32_t>(filter.limit)));
    const F slope = total * splat<F>(filter.slope), spread = sizes * splat<F>(filter.spread);
    PM_UNROLL
    for (int i = 0; i < count; ++i) {
      const F size = bit_cast<F>(magnitude_key(n[i]));
      const F bound = size * (size * splat<F>(filter.square[i]) + spread) + n[i] * slope;
      found = T::either(found, T::not_less(bound, splat<F>(filter.least[i])));
    }
    return found;
  } else {
    F above{};
    I y[K > 0 ? K : kFilteredModels];
    PM_UNROLL
    for (int i = 0; i < count; ++i) {
      const F squared = tau[i] * tau[i];
      if constexpr (kVariant == PcbVariant::kRoot) {
        const F scaled = squared * splat<F>(filter.square[i]);
        sizes = sizes + scaled;
        total = total + tau[i];
        y[i] = __builtin_convertvector(scaled, I);
      } else {
        sizes = sizes + squared;
        n[i] = (pcb_magnitude(call, tau[i], i) - splat<F>(call.lo[i])) * splat<F>(call.inv[i]);
        y[i] = __builtin_convertvector((n[i] * n[i]) * splat<F>(filter.square[i]), I);
        n[i] = bit_cast<F>(bit_cast<I>(n[i]) | (bit_cast<I>(tau[i]) & T::kSignMask));
        total = total + n[i];
        if constexpr (kVariant == PcbVariant::kVisionEs) above = above + T::larger(n[i], F{});
      }
    }
    auto found = T::at_least(magnitude_key(sizes), splat_bits<F>(bit_cast<int32_t>(filter.limit)));
    const F slope = splat<F>(filter.slope);
    const F less = (splat<F>(1.0f) - slope) * above;
    const F up = total * slope + less, down = total - less;
    PM_UNROLL
    for (int i = 0; i < count; ++i) {
      F p;
      if constexpr (kVariant == PcbVariant::kVisionEs) {
        p = n[i] * (tau[i] < F{} ? down : up) + splat<F>(filter.spread);
      } else {
        p = tau[i] * total;
      }
      const I sum = (I)((U)p + (U)y[i]);
      found = T::either(found, T::at_least(sum, splat_bits<F>(filter.key[i])));
    }
    return found;
  }
}

}  // namespace
}  // namespace pymerge
