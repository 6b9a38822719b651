// PCB-Merging: what is added to elements that one model only may have a share of, most of those
// that the filter leaves. A lane takes its model's numbers from tables, and only this model's score
// is computed: of the paper's K (K + 3) / 2 exp, K + 1.
//
// Only for calls and blocks that the filter holds for. There the other models' shares are +0, and
// what they add is +-0, which changes no sum: none is -0. The same operations in the same order as
// pcb_score and pcb_change, without what only chooses between +0 and -0 of a score below q > 0.
#pragma once

#include "cpu/lane_choice.h"
#include "cpu/pcb_scores.h"

namespace pymerge {
namespace {

constexpr int kSingleModels = 4;

struct PcbTables {
  ModelTable q, weight;
  ModelTable norm, pair_min[kSingleModels], pair_inv[kSingleModels], pair_norm[kSingleModels];
  ModelTable lo, hi, inv, top, top_inv;

  void take(const PcbCall& call) {
    const int count = call.num_models;
    if (count > kSingleModels) return;
    for (int m = 0; m < count; ++m) {
      q.set(m, call.q[m]);
      weight.set(m, call.weights[m]);
      if (call.variant == PcbVariant::kPaper) {
        norm.set(m, call.norm[m]);
        for (int j = 0; j < count; ++j) {
          const int pair = pcb_pair(m, j, count);
          pair_min[j].set(m, call.pair_min[pair]);
          pair_inv[j].set(m, call.pair_inv[pair]);
          pair_norm[j].set(m, call.pair_norm[pair]);
        }
      } else {
        lo.set(m, call.lo[m]);
        hi.set(m, call.hi[m]);
        inv.set(m, call.inv[m]);
        top.set(m, call.top[m]);
        top_inv.set(m, call.top_inv[m]);
      }
    }
  }
};

// Of K vectors, in each lane that of its model.
template <int K>
PM_INLINE F of_model(const F (&values)[K], I chosen) {
  F found = values[K - 1];
  PM_UNROLL
  for (int j = 0; j < K - 1; ++j) found = where_bit(chosen, 1 << j, values[j], found);
  return found;
}

// sgn(tau) n without the choice of +0 where tau is -0.
PM_INLINE F pcb_signed_normal(const PcbCall& call, F tau, int i) {
  const F lo = splat<F>(call.lo[i]);
  return with_sign(tau, (pcb_magnitude(call, tau, i) - lo) * splat<F>(call.inv[i]));
}

// sum_j tanh(n n_j), n that of the lane's model, n n the largest product as a rule: by itself.
template <int K>
PM_INLINE F pcb_tanh_sum(const F (&normal)[K], F n, F square, I chosen) {
  F terms[K], own[1] = {square};
  PM_UNROLL
  for (int j = 0; j < K; ++j) terms[j] = where_bit(chosen, 1 << j, F{}, n * normal[j]);
  tanh32_of<K>(terms);
  tanh32_of<1>(own);
  F sum{};
  PM_UNROLL
  for (int j = 0; j < K; ++j) sum = sum + where_bit(chosen, 1 << j, own[0], terms[j]);
  return sum;
}

// chosen: the bit of the model. Of other lanes, any number that is not a trap.
template <PcbVariant kVariant, int K>
PM_INLINE F pcb_single_change(const PcbCall& call, const PcbTables& tables, const F (&tau)[K],
                              I chosen) {
  using T = Traits<F>;
  const I places = table_places(chosen);
  const F many = splat<F>(static_cast<float>(K));
  const F own = of_model(tau, chosen), q = look_up(tables.q, places);
  F share, value = own;
  if constexpr (kVariant == PcbVariant::kPaper) {
    F x[K], intra[1];
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      x[j] = (own * tau[j] - look_up(tables.pair_min[j], places)) *
             look_up(tables.pair_inv[j], places);
    }
    intra[0] = many * of_model(x, chosen);
    exp32_of<K, false>(x);
    exp32_of<1, false>(intra);
    F inter{};
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      inter = sum_of(j, inter, x[j] * look_up(tables.pair_norm[j], places));
    }
    const F score = (intra[0] * look_up(tables.norm, places)) * inter;
    share = score >= q ? score : F{};
  } else {
    const F lo = look_up(tables.lo, places);
    F size = bit_cast<F>(magnitude_key(own));
    size = T::larger(lo, size);
    size = T::smaller(look_up(tables.hi, places), size);
    value = with_sign(own, size);
    const F n = (size - lo) * look_up(tables.inv, places), square = n * n;
    F intra[1] = {many * square}, inter[1];
    if constexpr (kVariant == PcbVariant::kRoot) {
      F total{};
      PM_UNROLL
      for (int j = 0; j < K; ++j) total = sum_of(j, total, tau[j]);
      inter[0] = own * total;
      tanh32_of<1>(inter);
    } else {
      F normal[K];
      PM_UNROLL
      for (int j = 0; j < K; ++j) normal[j] = pcb_signed_normal(call, tau[j], j);
      if constexpr (kVariant == PcbVariant::kVision) {
        F total{};
        PM_UNROLL
        for (int j = 0; j < K; ++j) total = sum_of(j, total, normal[j]);
        inter[0] = own * total;
        tanh32_of<1>(inter);
      } else {
        inter[0] = pcb_tanh_sum(normal, with_sign(own, n), square, chosen);
      }
    }
    exp32_of<1, false>(intra);
    F b = T::larger(q, intra[0] * inter[0]);
    b = T::smaller(look_up(tables.top, places), b);
    share = (b - q) * look_up(tables.top_inv, places);
  }
  const F least = splat<F>(1e-12f);
  const F sum = F{} + (look_up(tables.weight, places) * value) * share;
  return splat<F>(call.scale) * (sum / (share < least ? least : share));
}

}  // namespace
}  // namespace pymerge
