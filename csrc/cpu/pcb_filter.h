// PCB-Merging: finds the elements that may have a share above 0, at a fraction of the cost of their
// scores.
//
// A share is above 0 where a score reaches its threshold q, which a tenth of the scores does. If an
// element is filtered out, every model's score is proven to be below its q; if one passes
// needlessly, that costs only time. The bounds are in base-2 logarithms. They use L(x) = bits(x) /
// 2^23 - 127, which interpolates the logarithm linearly between powers of two: L(x) <= log2 x <=
// L(x) + 0.0861 for x > 0.
//
// kRoot, kVision   score = e^(K n^2) tanh(p) <= e^(K n^2) p where p > 0, and is not above 0
//                  otherwise. So score >= q needs L(p) + K n^2 log2 e >= log2 q - 0.0861. bits(p)
//                  of p < 0 is a negative integer, which is below every threshold.
//                  kRoot takes |tau| inv for n, which is not less, and the p of the score.
//                  kVision takes v = tau inv, not beyond hi inv, for sgn(tau) n: |v| is at most
//                  lo inv larger. With c the sum of these, p <= tau sum_j v_j + |tau| c.
// kVisionEs        For 0 <= x <= m: t x <= tanh x <= x, t = tanh(m) / m. With A the sum of the v_j
//                  above 0 and B that of the others' magnitudes, sum_j tanh(n_i n_j) is at most
//                  |v_i| (A - t (B - c)) where v_i > 0, |v_i| (B - t (A - c)) elsewhere; or 0.
// kPaper           x_ij = c_ij + d_ij, d_ij = tau_i tau_j inv_ij. Z_ij = z_ij e^c_ij, S_i their
//                  sum. A logarithm lies below its tangent, here at S_i:
//                  log2 score <= log2(z_i S_i) + K log2 e (c_ii + d_ii)
//                                + sum_j Z_ij (e^d_ij - 1) / (S_i ln 2),
//                  and e^d - 1 <= d + 0.595 d^2 where |d| <= 1/2, and <= d (e^f - 1) / f
//                  where 0 <= d <= f. With u_i = tau_i sqrt(inv_ii), d_ij = r_ij u_i u_j, r the
//                  largest r_ij, all b_ij = Z_ij r_ij / (S_i ln 2) near their mean b, at most h
//                  away, and |u_i u_j| <= (u_i^2 + u_j^2) / 2: the sum over j != i is at most
//                  b u_i (T - u_i) + h / 2 ((K - 2) u_i^2 + Q) + 0.595 (b + h) r u_i^2 Q, with T
//                  the sum of the u_j and Q that of their squares.
//
// Rounding errors of scores and bounds, at most 1e-4 of a logarithm, are covered by kSlack.
// Elements with large, infinite or NaN magnitudes are never filtered out.
#pragma once

#include <cmath>

#include "cpu/lane_choice.h"
#include "cpu/simd.h"
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
  float square[kFilteredModels];  // kPaper: factor of u^2, first; kRoot: 2^23 K inv^2 log2 e
  float gain[kFilteredModels];    // kPaper: sqrt(inv_ii); kVision, kVisionEs: inv g
  float most[kFilteredModels];    // kVision, kVisionEs: hi inv g; g^2 n^2 = 2^23 K n^2 log2 e
  float least[kFilteredModels];   // kPaper: the threshold
  int32_t key[kFilteredModels];   // others: the threshold, times 2^23
  float limit;                    // kPaper, kRoot: from here on no bound holds for an element
  float large;  // kPaper: no argument of exp is beyond 87 below this Q; others: no bound holds for
                // a block from here on
  float slope, spread;  // kPaper: b, h / 2; kVision: -, c g; kVisionEs: below
  float curve;          // kPaper: factor of u^2 Q
};

inline bool in_range(double x, double low, double high) { return x >= low && x <= high; }

// Sets the thresholds as logarithms, for a p scaled by `factor`. q is far from the subnormal range.
inline bool pcb_keys(const PcbCall& call, double factor, PcbFilter& filter) {
  for (int i = 0; i < call.num_models; ++i) {
    const double q = call.q[i];
    if (!in_range(q, 1e-30, 1e30)) return false;
    const double least = std::log2(q * factor) + 127 - kChord - kSlack;
    filter.key[i] = static_cast<int32_t>(std::floor(least * kExponent));
  }
  return true;
}

inline bool pcb_codes_filter(const PcbCall& call, PcbFilter& filter) {
  const int count = call.num_models;
  const bool root = call.variant == PcbVariant::kRoot;
  // (1 + 1e-6): for the rounding to floats.
  const double square = count * kLog2E * kExponent * (1 + 1e-6), gain = std::sqrt(square);
  double largest = 0, spread = 0;  // of n
  for (int i = 0; i < count; ++i) {
    const double lo = call.lo[i], hi = call.hi[i], inv = call.inv[i];
    if (!in_range(lo, 0, 1e15) || !in_range(hi, lo, 1e15) || !in_range(inv, 0, 1e14)) return false;
    // Below q a share is (q - q) times the inverse: +0.
    if (!in_range(call.top_inv[i], 1e-38, 3e38) || !(call.top[i] >= call.q[i])) return false;
    largest = std::fmax(largest, hi * inv * (1 + 1e-6));
    spread += lo * inv;
    filter.gain[i] = static_cast<float>(inv * gain);
    filter.most[i] = static_cast<float>(hi * inv * gain);
    // Not 0, so that the sum of y limits every tau.
    filter.square[i] = static_cast<float>(square * std::fmax(inv * inv, 1e-20));
  }
  // So that a logarithm of p, at most 2^80, and K n^2 log2 e fit the exponent of a float.
  const double most = 46;
  if (!(count * kLog2E * largest * largest <= most)) return false;
  filter.limit = static_cast<float>(most * kExponent);
  const double m = largest * largest;
  // The rounding errors of n, of tanh and of their sums grow with K^2.
  spread = spread * (1 + 1e-6) + count * count * largest * 2e-5;
  filter.spread = static_cast<float>(spread * gain);
  const bool vision = call.variant == PcbVariant::kVision;
  filter.large = vision ? 1e15f : HUGE_VALF;
  if (!root && !vision) {
    const double t = m < 1e-3 ? 0.999 : std::tanh(m) / m * (1 - 1e-6);
    filter.slope = static_cast<float>((1 - t) / 2);
    filter.spread = static_cast<float>(t * spread * gain);
  }
  return pcb_keys(call, root ? 1 : vision ? gain : gain * gain, filter);
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
        own[i] = factor;
      } else {
        least = std::fmin(least, factor);
        most = std::fmax(most, factor);
        cross = std::fmax(cross, inv / gain);
      }
    }
    logarithm[i] += std::log2(sum);
  }
  // |d_ij| <= cross Q / 2, here at most 1/2. Few models: pcb_single.h relies on d_ii <= 4.
  double slope = 0, half = 0, curve = 0, limit = count > 4 ? 1e6 : 4;
  if (count > 1) {
    slope = (least + most) / 2;
    half = (most - least) / 4;
    curve = 0.595 * most * cross;
    limit = std::fmin(limit, 1 / std::fmax(cross, 1e-12) * (1 - 1e-6));
  }
  const double others = slope * std::sqrt((count - 1) * limit);  // b |T - u| is not larger
  for (int i = 0; i < count; ++i) {
    const double q = std::log2(static_cast<double>(call.q[i])) - logarithm[i] - kSlack;
    // Up to d_ii = far. For larger d_ii the bound does not hold, but the computed value is above
    // the threshold anyway.
    bool found = false;
    for (double far = 0.25; far <= 1 && !found; far *= 2) {
      const double square =
          count * kLog2E + own[i] * (std::exp(far) - 1) / far - slope + half * (count - 2);
      const double u = std::sqrt(far), told = u * (u * (square + slope) - others);
      filter.square[i] = static_cast<float>(square);
      found = u * (square + slope) >= others && told >= q + 0.1;
    }
    if (!found) return false;
    filter.least[i] = static_cast<float>(q);
  }
  // They differ little: the largest serves all models.
  for (int i = 1; i < count; ++i) filter.square[0] = std::fmax(filter.square[0], filter.square[i]);
  filter.slope = static_cast<float>(slope);
  filter.spread = static_cast<float>(half);
  filter.curve = static_cast<float>(curve);
  filter.limit = static_cast<float>(limit);
  // What is added to K c_ii and to c_ij, which are at most 40: K d_ii, and d_ij.
  filter.large = static_cast<float>(40 / std::fmax(count, cross / 2));
  return true;
}

// The filter's constants for a call; not usable where its premises do not hold.
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

// A sum that starts with its first summand, which saves adding it to 0.
PM_INLINE F sum_of(int i, F sum, F x) { return i == 0 ? x : sum + x; }

// Finds the elements that some model may have a share of. kBits: `passing` gets, as bits, which of
// the K models may. largest: the maximum of the numbers that reveal large magnitudes, as unsigned
// integers, so that NaN counts.
template <PcbVariant kVariant, int K, bool kBits>
PM_INLINE FloatMasks::Mask pcb_survivors(const PcbFilter& filter, const PcbCall& call, const F* tau,
                                         U& largest, I& passing) {
  using T = Traits<F>;
  const int count = K > 0 ? K : call.num_models;
  const F slope = splat<F>(filter.slope), spread = splat<F>(filter.spread);
  F sizes{}, total{}, both{};
  F n[K > 0 ? K : kFilteredModels], size[K > 0 ? K : kFilteredModels];
  I y[K > 0 ? K : kFilteredModels];
  PM_UNROLL
  for (int i = 0; i < count; ++i) {
    if constexpr (kVariant == PcbVariant::kPaper) {
      n[i] = tau[i] * splat<F>(filter.gain[i]);
      size[i] = n[i] * n[i];
      sizes = sum_of(i, sizes, size[i]);
      total = sum_of(i, total, n[i]);
    } else if constexpr (kVariant == PcbVariant::kRoot) {
      const F scaled = (tau[i] * tau[i]) * splat<F>(filter.square[i]);
      y[i] = __builtin_convertvector(scaled, I);
      sizes = sum_of(i, sizes, scaled);
      total = sum_of(i, total, tau[i]);
    } else {
      const F scaled = tau[i] * splat<F>(filter.gain[i]);
      n[i] = not_beyond(scaled, splat<F>(filter.most[i]));
      y[i] = __builtin_convertvector(n[i] * n[i], I);
      total = sum_of(i, total, n[i]);
      if constexpr (kVariant == PcbVariant::kVision) {
        size[i] = bit_cast<F>(magnitude_key(tau[i]));
        sizes = sum_of(i, sizes, size[i]);
      } else {
        size[i] = bit_cast<F>(magnitude_key(n[i]));
        both = sum_of(i, both, size[i]);
        sizes = sum_of(i, sizes, scaled);
      }
    }
  }
  // Sums of terms of either sign: large ones may cancel, but infinity and NaN do not.
  if constexpr (kVariant == PcbVariant::kVisionEs) sizes = bit_cast<F>(magnitude_key(sizes));
  const U key = (U)sizes;
  largest = key > largest ? key : largest;
  T::Mask found{};
  passing = I{};
  const auto add = [&](int bits, T::Mask those) __attribute__((always_inline)) {
    if constexpr (kBits) {
      passing = with_bits(passing, bits, those);
    } else {
      found = T::either(found, those);
    }
  };
  if constexpr (kVariant == PcbVariant::kPaper || kVariant == PcbVariant::kRoot) {
    add((1 << K) - 1, T::not_less(sizes, splat<F>(filter.limit)));
  }
  // kVisionEs: |v| has one factor where v is above 0 and another elsewhere. Half their sum (used
  // with |v|) and half their difference (used with v).
  F middle{}, apart{};
  if constexpr (kVariant == PcbVariant::kVisionEs) {
    middle = T::about(both, slope, spread);
    apart = total * (splat<F>(1.0f) - slope);
  }
  const F shared_slope = total * slope, shared = sizes * spread;
  const F square = T::about(sizes, splat<F>(filter.curve), splat<F>(filter.square[0]));
  PM_UNROLL
  for (int i = 0; i < count; ++i) {
    if constexpr (kVariant == PcbVariant::kPaper) {
      const F bound = T::about(size[i], square, T::about(n[i], shared_slope, shared));
      add(1 << i, T::not_less(bound, splat<F>(filter.least[i])));
    } else {
      F p;
      if constexpr (kVariant == PcbVariant::kRoot) {
        p = tau[i] * total;
      } else if constexpr (kVariant == PcbVariant::kVision) {
        p = T::about(size[i], spread, tau[i] * total);
      } else {
        p = T::about(size[i], middle, n[i] * apart);
      }
      const I sum = (I)((U)p + (U)y[i]);
      add(1 << i, T::at_least(sum, splat_bits<F>(filter.key[i])));
    }
  }
  if constexpr (kBits) return T::at_least(passing, splat_bits<F>(1));
  return found;
}

}  // namespace
}  // namespace pymerge
