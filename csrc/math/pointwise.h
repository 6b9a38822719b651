// Methods that look at each element of all models, and at nothing else.
#pragma once

#include "math/value.h"

namespace pymerge {

template <class F>
PM_INLINE F absolute(F x) {
  return bit_cast<F>(magnitude_key(x));
}

// Parameters of one call: what `reals` means is said at each method.
template <class F>
struct PointwiseCall {
  const typename Traits<F>::Scalar* reals;
  int num_models;
};

// The sum of task vectors, in order. (It may be -0, which plays no part in what is made of it.)
template <class F, class Load>
PM_INLINE F sum_of_deltas(F base, Load load, const PointwiseCall<F>& call) {
  F sum = load(0) - base;
  PM_UNROLL
  for (int k = 1; k < call.num_models; ++k) sum = sum + (load(k) - base);
  return sum;
}

// x / num_models: a product where that is exact.
template <class F>
PM_INLINE F over_models(F x, const PointwiseCall<F>& call) {
  using Scalar = typename Traits<F>::Scalar;
  const auto many = static_cast<Scalar>(call.num_models);
  const bool exact = (call.num_models & (call.num_models - 1)) == 0;
  return exact ? x * splat<F>(1 / many) : x / splat<F>(many);
}

// NearSwap: towards the other model where both are near: w = min(t / max(|a - b|, 1e-6), 1),
// out = w b + (1 - w) a. reals: t, 1e-6. Models: b.
template <class F, class Load>
PM_INLINE F nearswap_point(F a, Load load, const PointwiseCall<F>& call) {
  const F one = splat<F>(1), least = splat<F>(call.reals[1]);
  const F b = load(0);
  F distance = absolute(a - b);
  distance = distance < least ? least : distance;
  F w = splat<F>(call.reals[0]) / distance;
  w = w > one ? one : w;
  w = w < F{} ? F{} : w;
  return w * b + (one - w) * a;
}

// RAM: the mean of the task vectors that changed an element, |tau_k| > e_k; where only model k did,
// its own times f_k. reals: e_0 .. e_{K-1}, f_0 .. f_{K-1}.
template <class F, class Load>
PM_INLINE F ram_point(F base, Load load, const PointwiseCall<F>& call) {
  using T = Traits<F>;
  const F one = splat<F>(1);
  F sum{}, count{}, scaled{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F delta = load(k) - base;
    const auto active = T::greater(absolute(delta), splat<F>(call.reals[k]));
    sum = T::add(sum, delta, active);
    scaled = T::add(scaled, splat<F>(call.reals[call.num_models + k]) * delta, active);
    count = T::add(count, one, active);
  }
  const F mean = sum / (count > one ? count : one);
  return base + (count == one ? scaled : mean);
}

// MagMax: the element of the task vector where it is largest in magnitude; the first of equals.
// reals: scale.
template <class F, class Load>
PM_INLINE F magmax_point(F base, Load load, const PointwiseCall<F>& call) {
  F best{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F delta = load(k) - base;
    best = magnitude_key(delta) > magnitude_key(best) ? delta : best;
  }
  return base + splat<F>(call.reals[0]) * best;
}

// Consensus: the sum of task vectors, where at least `need` of the models call the element theirs:
// |tau_k| > lambda_k |theta_m - theta_k| with theta_m = base + scale sum_k tau_k.
// reals: scale, need, lambda_0 .. lambda_{K-1}.
template <class F, class Load>
PM_INLINE F consensus_ta_point(F base, Load load, const PointwiseCall<F>& call) {
  using T = Traits<F>;
  const F sum = sum_of_deltas(base, load, call);
  const F merged = base + splat<F>(call.reals[0]) * sum;
  F count{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F x = load(k);
    const F apart = splat<F>(call.reals[2 + k]) * absolute(merged - x);
    count = T::add(count, splat<F>(1), T::greater(absolute(x - base), apart));
  }
  return base + splat<F>(call.reals[0]) * (count >= splat<F>(call.reals[1]) ? sum : F{});
}

// TALL masks: the merged task vector where it is one task's: as consensus_ta, of one task.
// reals: scale, lambda, task.
template <class F, class Load>
PM_INLINE F tall_masks_point(F base, Load load, const PointwiseCall<F>& call) {
  const int task = static_cast<int>(call.reals[2]);
  F sum{}, x{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F own =
        load(k);  // chosen here: an index that is not known would cost a GPU its registers
    sum = sum + (own - base);
    if (k == task) x = own;
  }
  const F scaled = splat<F>(call.reals[0]) * sum;
  const F merged = base + scaled;
  const auto own = absolute(x - base) > splat<F>(call.reals[1]) * absolute(merged - x);
  return base + (own ? scaled : F{});
}

// EMR: the sign of the sum (0 elects -), the largest magnitude of those that agree; for one task,
// where it agrees, times its rescaler. reals: task (-1: none), rescaler.
template <class F, class Load>
PM_INLINE F emr_point(F base, Load load, const PointwiseCall<F>& call) {
  const int task = static_cast<int>(call.reals[0]);
  F sum{}, highest{}, deepest{}, own{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F delta = load(k) - base;
    sum = sum + delta;
    highest = delta > highest ? delta : highest;
    deepest = delta < deepest ? delta : deepest;
    if (k == task) own = delta;
  }
  const auto positive = sum > F{};
  const F unified = positive ? highest : -(F{} - deepest);  // of 0 it is -0
  if (task < 0) return base + unified;
  const F aligned = positive ? own : -own;
  return base + splat<F>(call.reals[1]) * (aligned > F{} ? unified : F{});
}

// The variance over the models' task vectors. Nothing of the base is added.
template <class F, class Load>
PM_INLINE F variance_point(F base, Load load, const PointwiseCall<F>& call) {
  const F mean = over_models(sum_of_deltas(base, load, call), call);
  F squares{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F apart = (load(k) - base) - mean;
    squares = squares + apart * apart;
  }
  return over_models(squares, call);
}

// SCE: the weighted mean of the task vectors that have the sign of the sum (0 elects +). reals:
// everywhere (not 0: elements whose variance is below the threshold are taken as 0, and the sum of
// weights as at least 1e-6), threshold, weights.
template <class F, class Load>
PM_INLINE F sce_point(F base, Load load, const PointwiseCall<F>& call) {
  using T = Traits<F>;
  using Bits = typename T::Bits;
  const bool everywhere = call.reals[0] != 0;
  const F sum = sum_of_deltas(base, load, call);
  // What a sum of -0 elects does not matter: its task vectors are all 0.
  const Bits sign = bit_cast<Bits>(sum) & T::kSignMask;
  F merged{}, total{};
  PM_UNROLL
  for (int k = 0; k < call.num_models; ++k) {
    const F delta = load(k) - base;
    const F weight = splat<F>(call.reals[2 + k]);
    const auto agrees = T::greater(bit_cast<F>(bit_cast<Bits>(delta) ^ sign), F{});
    merged = T::add(merged, weight * delta, agrees);
    total = T::add(total, weight, agrees);
  }
  const F one = splat<F>(1), least = splat<F>(static_cast<typename Traits<F>::Scalar>(1e-6));
  merged = merged / (everywhere ? (total < least ? least : total) : (total == F{} ? one : total));
  if (everywhere) {
    const F variance = variance_point(base, load, call);
    merged = variance >= splat<F>(call.reals[1]) ? merged : F{};
  }
  // NaN agrees with nothing, but must not be lost.
  merged = sum != sum ? sum : merged;
  return base + merged;
}

// The median of what the models have, or of their task vectors; of an even number of models the
// mean of the middle two. NaN if one is NaN. reals: scale, whether of task vectors.
template <class F, class Load>
PM_INLINE F median_point(F base, Load load, const PointwiseCall<F>& call) {
  using T = Traits<F>;
  using Bits = typename T::Bits;
  const F half = splat<F>(static_cast<typename T::Scalar>(0.5));
  const F origin = call.reals[1] != 0 ? base : F{};
  const int models = call.num_models;
  F lower{}, upper{}, nan{};
  PM_UNROLL
  for (int k = 0; k < models; ++k) {
    const F own = load(k);
    // Its place among all, equal ones by the order of the models. Task vectors have the same order.
    Bits after{}, before{};
    PM_UNROLL
    for (int j = 0; j < k; ++j) after = T::count(after, T::greater(load(j), own));
    PM_UNROLL
    for (int j = k + 1; j < models; ++j) before = T::count(before, T::greater(own, load(j)));
    const Bits rank = before - after + k;
    lower = rank == (models - 1) / 2 ? own : lower;
    upper = rank == models / 2 ? own : upper;
    nan = own != own ? own : nan;
  }
  // Halves are exact, save of the least numbers, and cannot overflow.
  lower = lower - origin;
  upper = upper - origin;
  const F middle = lower == upper ? lower : half * lower + half * upper;
  return origin + splat<F>(call.reals[0]) * (nan != nan ? nan : middle);
}

}  // namespace pymerge
