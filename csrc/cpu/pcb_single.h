// PCB-Merging: what is added to elements that one model only may have a share of, most of those
// that the filter leaves. A lane takes its model's numbers from tables, and only this model's score
// is computed: of the paper's K (K + 3) / 2 exp, K + 1.
//
// Only for calls and blocks that the filter holds for. There the other models' shares are +0, and
// what they add is +-0, which changes no sum: none is -0. The same operations in the same order as
// pcb_score and pcb_change, without what only chooses between +0 and -0 of a score below q > 0.
#pragma once

#include "cpu/lane_choice.h"
#include "cpu/pcb_filter.h"
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

// sum_j tanh(n n_j) of W vectors, n that of the lane's model. Its square is large in many lanes, of
// the other products as a rule one at most, so these share one exp. `again`: lanes with several.
template <int K, int W>
PM_INLINE void pcb_tanh_sums(const F (&normal)[W][K], const F (&n)[W], const F (&square)[W],
                             const I (&chosen)[W], F (&sums)[W],
                             FloatMasks::Mask (&again)[W]) {
  using T = Traits<F>;
  const I limit = splat_bits<F>(bit_cast<int32_t>(0.625f));
  F x[W][K], found[W][K], own[W], far[2 * W];
  T::Mask large[W][K], large_own[W], any{};
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    I largest{};
    T::Mask seen{};
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      x[w][j] = where_bit(chosen[w], 1 << j, F{}, n[w] * normal[w][j]);
      const I key = magnitude_key(x[w][j]);
      largest = j == 0 || key > largest ? key : largest;
      large[w][j] = T::at_least(key, limit);
      again[w] = T::either(again[w], T::both(seen, large[w][j]));
      seen = T::either(seen, large[w][j]);
    }
    large_own[w] = T::at_least((I)square[w], limit);
    any = T::either(any, T::either(seen, large_own[w]));
    far[2 * w] = bit_cast<F>(largest);
    far[2 * w + 1] = square[w];
    tanh32_near<K>(x[w], found[w]);
  }
  tanh32_near<W>(square, own);
  if (T::any(any)) {
    tanh32_of_large<2 * W, false, true>(far);
    PM_UNROLL
    for (int w = 0; w < W; ++w) {
      PM_UNROLL
      for (int j = 0; j < K; ++j) {
        found[w][j] = where(large[w][j], with_sign(x[w][j], far[2 * w]), found[w][j]);
      }
      own[w] = where(large_own[w], far[2 * w + 1], own[w]);
    }
  }
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    F sum{};
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      sum = sum_of(j, sum, where_bit(chosen[w], 1 << j, own[w], found[w][j]));
    }
    sums[w] = sum;
  }
}

// score / norm_m of W vectors and the paper's variant: exp(K x_mm) times the sum of the others'.
template <int K, int W>
PM_INLINE void pcb_paper_scores(const PcbTables& tables, const F (&tau)[W][K], const F (&own)[W],
                                const I (&chosen)[W], const I (&places)[W], F (&scores)[W]) {
  const F many = splat<F>(static_cast<float>(K));
  F x[W][K], intra[W];
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      const F least = look_up(tables.pair_min[j], places[w]);
      x[w][j] = (own[w] * tau[w][j] - least) * look_up(tables.pair_inv[j], places[w]);
    }
    intra[w] = many * of_model(x[w], chosen[w]);
  }
  PM_UNROLL
  for (int w = 0; w < W; ++w) exp32_of<K, false, true>(x[w]);
  exp32_of<W, false, true>(intra);
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    F inter{};
    PM_UNROLL
    for (int j = 0; j < K; ++j) {
      inter = sum_of(j, inter, x[w][j] * look_up(tables.pair_norm[j], places[w]));
    }
    scores[w] = (intra[w] * look_up(tables.norm, places[w])) * inter;
  }
}

// Of W vectors. chosen: the bit of the model; in lanes with none or several, anything comes.
// again: lanes of which anything comes, too.
template <PcbVariant kVariant, int K, int W>
PM_INLINE void pcb_single_changes(const PcbCall& call, const PcbTables& tables,
                                  const F (&tau)[W][K], const I (&chosen)[W], F (&changes)[W],
                                  FloatMasks::Mask (&again)[W]) {
  using T = Traits<F>;
  const F many = splat<F>(static_cast<float>(K));
  I places[W];
  F own[W], value[W], share[W];
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    places[w] = table_places(chosen[w]);
    own[w] = of_model(tau[w], chosen[w]);
  }
  if constexpr (kVariant == PcbVariant::kPaper) {
    F score[W];
    pcb_paper_scores(tables, tau, own, chosen, places, score);
    PM_UNROLL
    for (int w = 0; w < W; ++w) {
      share[w] = score[w] >= look_up(tables.q, places[w]) ? score[w] : F{};
      value[w] = own[w];
    }
  } else {
    F n[W], square[W], intra[W], inter[W], normal[W][K];
    PM_UNROLL
    for (int w = 0; w < W; ++w) {
      const F lo = look_up(tables.lo, places[w]);
      F size = bit_cast<F>(magnitude_key(own[w]));
      size = T::larger(lo, size);
      size = T::smaller(look_up(tables.hi, places[w]), size);
      value[w] = with_sign(own[w], size);
      n[w] = (size - lo) * look_up(tables.inv, places[w]);
      square[w] = n[w] * n[w];
      intra[w] = many * square[w];
      n[w] = with_sign(own[w], n[w]);
      F total{};
      PM_UNROLL
      for (int j = 0; j < K; ++j) {
        if (kVariant != PcbVariant::kRoot) normal[w][j] = pcb_signed_normal(call, tau[w][j], j);
        total = sum_of(j, total, kVariant == PcbVariant::kRoot ? tau[w][j] : normal[w][j]);
      }
      inter[w] = own[w] * total;
    }
    exp32_of<W, false, true>(intra);
    if constexpr (kVariant == PcbVariant::kVisionEs) {
      pcb_tanh_sums(normal, n, square, chosen, inter, again);
    } else {
      tanh32_of<W>(inter);
    }
    PM_UNROLL
    for (int w = 0; w < W; ++w) {
      const F q = look_up(tables.q, places[w]);
      F b = T::larger(q, intra[w] * inter[w]);
      b = T::smaller(look_up(tables.top, places[w]), b);
      share[w] = (b - q) * look_up(tables.top_inv, places[w]);
    }
  }
  const F least = splat<F>(1e-12f);
  PM_UNROLL
  for (int w = 0; w < W; ++w) {
    const F sum = F{} + (look_up(tables.weight, places[w]) * value[w]) * share[w];
    changes[w] = splat<F>(call.scale) * (sum / (share[w] < least ? least : share[w]));
  }
}

}  // namespace
}  // namespace pymerge
