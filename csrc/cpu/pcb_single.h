// PCB-Merging in bf16: elements that only one model has a share of. These are most of the elements
// that pass the filter (pcb_filter.h). Such a share s cancels but for rounding; the change is
//   scale ((w v s) / s), v the task vector's element, clipped in the authors' variants.
// With t = scale w v it is within 6 |t| 2^-24 of t. So wherever base + t is not close to the
// midpoint of two bf16 numbers, s need not be known; it is enough that the score certainly reaches
// its threshold, which a lower bound shows. All other elements are computed in full.
//
// The lower bounds, of the score of model i:
//
// kPaper   ln of the sum of Z_j e^d_j (as in pcb_filter.h) is convex in the d_j, so it lies above
//          its tangent at 0: ln score >= ln(z_i S_i) + K c_ii + sum_j (K [j = i] + Z_j / S_i) d_j.
// others   e^(K n^2) = (e^y)^8 with y = K n^2 / 8 >= 0, and e^y >= 1 + y + y^2 / 2 + y^3 / 6.
//          tanh p >= p (1 - p^2 / 3) for p >= 0, and where p < 0 the score is not above 0 either.
//          kVisionEs: an odd polynomial, within 6e-5 of tanh x for |x| <= 1.01.
//
// Computed scores are within 1e-4 of the exact ones, which the thresholds' factor covers.
#pragma once

#include "cpu/pcb_filter.h"

namespace pymerge {
namespace {

constexpr int kSingleModels = 4;

template <class Io, int K>
constexpr bool kSingles = kLookUps && Io::kDtype == Dtype::kBF16 && K > 0 && K <= kSingleModels;

// Numbers of each model, from which every lane takes those of its model.
struct PcbSingles {
  bool usable = false;
  ModelTable factor;                // scale w
  ModelTable least;                 // of the bound
  ModelTable slope[kSingleModels];  // kPaper: of d_j
  ModelTable lo, hi, inv, lowest;   // others; lowest: lo inv
};

inline bool pcb_single_numbers(const PcbCall& call, int i, PcbSingles& singles) {
  // So that no product with a share or a score overflows, and subnormal products change t by less
  // than 2^-100.
  const double factor = static_cast<double>(call.scale) * call.weights[i];
  if (!in_range(call.scale, -1e6, 1e6) || !in_range(call.weights[i], -1e6, 1e6)) return false;
  singles.factor.set(i, static_cast<float>(factor));
  const int count = call.num_models;
  const double q = call.q[i];
  if (call.variant == PcbVariant::kPaper) {
    double sum = 0, z[kSingleModels];
    for (int j = 0; j < count; ++j) {
      const int pair = pcb_pair(i, j, count);
      const double centre = -static_cast<double>(call.pair_min[pair]) * call.pair_inv[pair];
      if (!in_range(call.pair_norm[pair], 1e-6, 1e6) || !in_range(centre, -1, 1)) return false;
      z[j] = call.pair_norm[pair] * std::exp(centre);
      sum += z[j];
    }
    const int own = pcb_pair(i, i, count);
    const double inv = call.pair_inv[own], centre = -call.pair_min[own] * inv;
    if (!in_range(call.norm[i], 1e-6, 1e6) || !in_range(q, 1e-9, 1e30) || !(inv >= 1e-12)) {
      return false;
    }
    for (int j = 0; j < count; ++j) {
      const double slope = (i == j ? count : 0) + z[j] / sum;
      singles.slope[j].set(i, static_cast<float>(slope * call.pair_inv[pcb_pair(i, j, count)]));
    }
    const double known = std::log(call.norm[i] * sum) + count * centre;
    singles.least.set(i, static_cast<float>(std::log(q) - known + 1e-3));
    return true;
  }
  const double lo = call.lo[i], hi = call.hi[i], inv = call.inv[i], top = call.top[i];
  // n up to 1, and a share that is not tiny where the score is above the threshold by its factor.
  if (!((hi - lo) * inv <= 1.001 && hi * inv <= 16)) return false;
  const double share = std::fmin(q / 2048, top - q) * call.top_inv[i];
  if (!(share >= 1e-9 && (top - q) * call.top_inv[i] <= 1e6)) return false;
  singles.lo.set(i, call.lo[i]);
  singles.hi.set(i, call.hi[i]);
  singles.inv.set(i, call.inv[i]);
  singles.lowest.set(i, static_cast<float>(lo * inv));
  singles.least.set(i, static_cast<float>(q * (1 + 1.0 / 1024)));
  return true;
}

inline PcbSingles pcb_singles(const PcbCall& call, const PcbFilter& filter) {
  PcbSingles singles;
  if (!filter.usable || call.num_models > kSingleModels) return singles;
  singles.usable = true;
  for (int i = 0; i < call.num_models && singles.usable; ++i) {
    singles.usable = pcb_single_numbers(call, i, singles);
  }
  return singles;
}

// sgn(tau) n, rounded differently than in the score: within 4e-6 of it.
PM_INLINE F pcb_near_normal(F clipped, F inv, F lowest) {
  return Traits<F>::about(clipped, inv, -with_sign(clipped, lowest));
}

// Lower bounds of scores, and the values that their shares weight. kVisionEs: `lost` gets the lanes
// whose scores are certainly below their thresholds. chosen: the bit of the model.
template <PcbVariant kVariant, int K>
PM_INLINE F pcb_score_at_least(const PcbCall& call, const PcbSingles& singles, const F (&tau)[K],
                               I chosen, I places, F& value, FloatMasks::Mask& lost) {
  using T = Traits<F>;
  const F own = of_model(tau, chosen);
  if constexpr (kVariant == PcbVariant::kPaper) {
    value = own;
    F sum = look_up(singles.slope[0], places) * tau[0];
    PM_UNROLL
    for (int j = 1; j < K; ++j) sum = T::about(look_up(singles.slope[j], places), tau[j], sum);
    return own * sum;
  }
  value = not_beyond(not_within(own, look_up(singles.lo, places)), look_up(singles.hi, places));
  const F n = pcb_near_normal(value, look_up(singles.inv, places), look_up(singles.lowest, places));
  const F y = (n * n) * splat<F>(static_cast<float>(K) / 8);
  F power = T::about(y, splat<F>(1.0f / 6), splat<F>(0.5f));
  power = T::about(power, y, splat<F>(1.0f));
  power = T::about(power, y, splat<F>(1.0f));
  power = power * power;
  power = power * power;
  power = power * power;
  F normal[K], total{};
  PM_UNROLL
  for (int j = 0; j < K; ++j) {
    if constexpr (kVariant == PcbVariant::kRoot) {
      normal[j] = tau[j];
    } else {
      const F lo = splat<F>(call.lo[j]), inv = splat<F>(call.inv[j]);
      const F clipped = not_beyond(not_within(tau[j], lo), splat<F>(call.hi[j]));
      normal[j] = pcb_near_normal(clipped, inv, lo * inv);
    }
    total = sum_of(j, total, normal[j]);
  }
  if constexpr (kVariant == PcbVariant::kVisionEs) {
    F sum = splat<F>(-1e-4f * K);
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      const F x = n * normal[j], z = x * x;
      F p = T::about(z, splat<F>(-0.0243205f), splat<F>(0.1149157f));
      p = T::about(p, z, splat<F>(-0.3286866f));
      p = T::about(p, z, splat<F>(0.9996737f));
      sum = T::about(p, x, sum);
    }
    // y <= 0.502: the powers of e^y are at most 1.022 times this polynomial's.
    const F least = look_up(singles.least, places) * splat<F>(0.974f);
    lost = T::greater(least, power * (sum + splat<F>(2e-4f * K)));
    return power * sum;
  }
  F p = own * total;
  if constexpr (kVariant == PcbVariant::kVision) {
    p = T::about(bit_cast<F>(magnitude_key(own)), splat<F>(-1e-4f), p);
  }
  const F less = T::about(p * p, splat<F>(-1.0f / 3), splat<F>(1.0f));
  return power * (p * T::larger(less, F{}));
}

// Computes the change of the base; returns the lanes with one bit in which it is certain.
template <PcbVariant kVariant, int K>
PM_INLINE FloatMasks::Mask pcb_single_change(const PcbCall& call, const PcbSingles& singles, F base,
                                             const F (&tau)[K], I chosen, F& change) {
  using T = Traits<F>;
  const I places = table_places(chosen);
  F value;
  T::Mask lost{};
  const F bound = pcb_score_at_least<kVariant>(call, singles, tau, chosen, places, value, lost);
  change = look_up(singles.factor, places) * value;
  const F sum = base + change;
  // Where |t| is at most 8 |base + t|, 6 |t| 2^-24 are at most 48 of the 2^16 steps that base + t
  // has between two numbers in bf16; the middle is at 2^15.
  const I steps = (I)((U)sum + 0x8040u) & 0xffff;
  const I eighth = magnitude_key(change) - (3 << 23), tiny = splat_bits<F>(0x21800000);
  const auto clear = T::both(T::at_least(steps, splat_bits<F>(0x80)),
                             T::at_least(magnitude_key(sum), eighth > tiny ? eighth : tiny));
  auto certain = T::both(clear, T::greater(bound, look_up(singles.least, places)));
  if constexpr (kVariant == PcbVariant::kVisionEs) {
    change = where(lost, splat<F>(call.scale) * F{}, change);
    certain = T::either(certain, lost);
  }
  return T::both(certain, one_bit(chosen));
}

}  // namespace
}  // namespace pymerge
