// PCB-Merging (Du et al. 2024): competition within and between task vectors decides which part of
// each parameter is kept, and with which weight.
//
// Variants: kPaper is the paper's formula. The authors' codes differ from it and from each other:
// kRoot (pcb-merging.py, and with other quantiles the NLP code), kVision (pcb.py), kVisionEs
// (pcb_ES.py). With tau_k the task vectors, K of them, D elements in the scope:
//
// kPaper   x_ij = (tau_i tau_j - min_ij) inv_ij          min and max over the scope
//          beta_i = exp(K x_ii) z_i * sum_j exp(x_ij) z_ij     z = D / sum of the exp
//          out = base + scale * sum_i l_i m_i beta_i tau_i / sum_i m_i beta_i,  m_i: beta_i >= q_i
// others   a_i = clamp(|tau_i|, lo_i, hi_i), c_i = sgn(tau_i) a_i, n_i = (a_i - lo_i) inv_i
//          b_i = exp(K n_i^2) * tanh(tau_i sum_j tau_j)                  kRoot
//                               tanh(tau_i sum_j sgn(tau_j) n_j)         kVision
//                               sum_j tanh(sgn(tau_i) n_i sgn(tau_j) n_j)   kVisionEs
//          s_i = (clamp(b_i, q_i, top_i) - q_i) inv'_i, or 1 where top_i = q_i
//          out = base + scale * sum_i l_i c_i s_i / max(sum_i s_i, 1e-12)
#pragma once

#include <cstdint>

#include "math/functions.h"

namespace pymerge {

enum class PcbVariant { kPaper = 0, kRoot = 1, kVision = 2, kVisionEs = 3 };

// Pointers to one number for each model, or for each pair i <= j (row by row).
struct PcbCall {
  PcbVariant variant;
  int num_models;
  const float* pair_min;   // kPaper
  const float* pair_inv;   // kPaper
  const float* pair_norm;  // kPaper: z_ij
  const float* norm;       // kPaper: z_i
  const float* lo;         // others
  const float* hi;         // others
  const float* inv;        // others
  const float* q;
  const float* top;      // others
  const float* top_inv;  // others: 0 where top = q
  const float* weights;  // l
  float scale;
};

// The numbers of a call in the order of PcbArgs.
PM_INLINE PcbCall pcb_call(PcbVariant variant, int count, const float* reals) {
  const int pairs = count * (count + 1) / 2;
  PcbCall call{};
  call.variant = variant;
  call.num_models = count;
  if (variant == PcbVariant::kPaper) {
    call.pair_min = reals;
    call.pair_inv = reals + pairs;
    call.pair_norm = reals + 2 * pairs;
    call.norm = reals + 3 * pairs;
    call.q = call.norm + count;
    call.weights = call.q + count;
  } else {
    call.lo = reals;
    call.hi = reals + count;
    call.inv = reals + 2 * count;
    call.q = reals + 3 * count;
    call.top = reals + 4 * count;
    call.top_inv = reals + 5 * count;
    call.weights = reals + 6 * count;
  }
  call.scale = call.weights[count];
  return call;
}

static constexpr int64_t pcb_reals(PcbVariant variant, int64_t count) {
  return (variant == PcbVariant::kPaper ? 3 * (count * (count + 1) / 2) + 3 * count : 7 * count) +
         1;
}

PM_INLINE int pcb_pair(int i, int j, int count) {
  const int a = i < j ? i : j, b = i < j ? j : i;
  return a * count - a * (a - 1) / 2 + (b - a);
}

// sgn(x) size, with size >= 0: 0 if x is 0.
template <class F>
PM_INLINE F pcb_signed(F x, F size) {
  using T = Traits<F>;
  const auto sign = bit_cast<typename T::Bits>(x) & T::kSignMask;
  const F with_sign = bit_cast<F>(bit_cast<typename T::Bits>(size) | sign);
  return T::keep(with_sign, T::at_least(magnitude_key(x), splat_bits<F>(1)));
}

// x_ij of the paper.
template <class F>
PM_INLINE F pcb_product(const PcbCall& call, F tau_i, F tau_j, int i, int j) {
  const int pair = pcb_pair(i, j, call.num_models);
  return (tau_i * tau_j - splat<F>(call.pair_min[pair])) * splat<F>(call.pair_inv[pair]);
}

template <class F>
PM_INLINE F pcb_magnitude(const PcbCall& call, F tau, int i) {
  const F lo = splat<F>(call.lo[i]), hi = splat<F>(call.hi[i]);
  F a = bit_cast<F>(magnitude_key(tau));
  a = Traits<F>::larger(lo, a);
  return Traits<F>::smaller(hi, a);
}

// sgn(tau_i) n_i
template <class F>
PM_INLINE F pcb_normal(const PcbCall& call, F tau, int i) {
  const F n = (pcb_magnitude(call, tau, i) - splat<F>(call.lo[i])) * splat<F>(call.inv[i]);
  return pcb_signed(tau, n);
}

// The part of the scores that all models share: the sum in tanh. tau[i] returns the task vectors'
// elements.
template <class F, class Taus>
PM_INLINE F pcb_total(const PcbCall& call, const Taus& tau) {
  F sum{};
  if (call.variant == PcbVariant::kPaper || call.variant == PcbVariant::kVisionEs) return sum;
  PM_UNROLL
  for (int j = 0; j < call.num_models; ++j) {
    const F value = tau[j];
    sum = sum + (call.variant == PcbVariant::kRoot ? value : pcb_normal(call, value, j));
  }
  return sum;
}

// beta_i or b_i.
template <class F, class Taus>
PM_INLINE F pcb_score(const PcbCall& call, const Taus& tau, F total, int i) {
  const int count = call.num_models;
  const F many = splat<F>(static_cast<float>(count));
  const F own = tau[i];
  F inter{};
  if (call.variant == PcbVariant::kPaper) {
    PM_UNROLL
    for (int j = 0; j < count; ++j) {
      const F other = tau[j];
      const float z = call.pair_norm[pcb_pair(i, j, count)];
      inter = inter + exp32(pcb_product(call, own, other, i, j)) * splat<F>(z);
    }
    const F intra = exp32(many * pcb_product(call, own, own, i, i)) * splat<F>(call.norm[i]);
    return intra * inter;
  }
  const F n = pcb_normal(call, own, i);
  const F intra = exp32(many * (n * n));
  if (call.variant == PcbVariant::kVisionEs) {
    PM_UNROLL
    for (int j = 0; j < count; ++j) {
      const F other = tau[j];
      inter = inter + tanh32(n * pcb_normal(call, other, j));
    }
  } else {
    inter = tanh32(own * total);
  }
  return intra * inter;
}

// The same for all models.
template <class F, class Taus>
PM_INLINE void pcb_scores(const PcbCall& call, const Taus& tau, F* scores) {
  const F total = pcb_total<F>(call, tau);
  PM_UNROLL
  for (int i = 0; i < call.num_models; ++i) scores[i] = pcb_score(call, tau, total, i);
}

// The same for K models in an array. A pair's exp or tanh serves both of its models, since their
// product is the same in either order. kMost: the number of models for which there are enough
// registers.
template <int kMost, class F, int K>
PM_INLINE void pcb_scores_of(const PcbCall& call, const F (&tau)[K], F (&scores)[K]) {
  if constexpr (K <= kMost) {
    if (call.variant == PcbVariant::kPaper) {
      const F many = splat<F>(static_cast<float>(K));
      F terms[K * (K + 1) / 2], own[K];
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        PM_UNROLL
        for (int j = i; j < K; ++j) {
          const int pair = pcb_pair(i, j, K);
          const F x = pcb_product(call, tau[i], tau[j], i, j);
          terms[pair] = exp32(x) * splat<F>(call.pair_norm[pair]);
          if (i == j) own[i] = exp32(many * x) * splat<F>(call.norm[i]);
        }
      }
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        F inter{};
        PM_UNROLL
        for (int j = 0; j < K; ++j) inter = inter + terms[pcb_pair(i, j, K)];
        scores[i] = own[i] * inter;
      }
      return;
    }
    if (call.variant == PcbVariant::kVisionEs) {
      const F many = splat<F>(static_cast<float>(K));
      F terms[K * (K + 1) / 2], normal[K];
      PM_UNROLL
      for (int i = 0; i < K; ++i) normal[i] = pcb_normal(call, tau[i], i);
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        PM_UNROLL
        for (int j = i; j < K; ++j) terms[pcb_pair(i, j, K)] = tanh32(normal[i] * normal[j]);
      }
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        F inter{};
        PM_UNROLL
        for (int j = 0; j < K; ++j) inter = inter + terms[pcb_pair(i, j, K)];
        scores[i] = exp32(many * (normal[i] * normal[i])) * inter;
      }
      return;
    }
  }
  pcb_scores(call, tau, &scores[0]);
}

// The values whose order statistics are taken: NaN and values that are not positive count as 0.
// scale: 1, or -1 for the statistics of scores below 0.
template <class F>
PM_INLINE F pcb_positive(const PcbCall& call, F score) {
  return Traits<F>::larger(splat<F>(call.scale) * score, F{});
}

// The change that the merge adds to the base.
template <class F, class Taus, class Scores>
PM_INLINE F pcb_change(const PcbCall& call, const Taus& tau, const Scores& scores) {
  const bool paper = call.variant == PcbVariant::kPaper;
  F sum{}, total{};
  PM_UNROLL
  for (int i = 0; i < call.num_models; ++i) {
    const F q = splat<F>(call.q[i]), score = scores[i], own = tau[i];
    F share;
    F value = own;
    if (paper) {
      share = score >= q ? score : F{};
    } else {
      const F top = splat<F>(call.top[i]);
      F b = Traits<F>::larger(q, score);
      b = Traits<F>::smaller(top, b);
      const F inverse = splat<F>(call.top_inv[i]);
      share = inverse == F{} ? splat<F>(1.0f) : (b - q) * inverse;
      value = pcb_signed(own, pcb_magnitude(call, own, i));
    }
    sum = sum + (splat<F>(call.weights[i]) * value) * share;
    total = total + share;
  }
  const F least = splat<F>(1e-12f);
  return splat<F>(call.scale) * (sum / (total < least ? least : total));
}

template <class F, class Taus, class Scores>
PM_INLINE F pcb_merge(const PcbCall& call, F base, const Taus& tau, const Scores& scores) {
  return base + pcb_change<F>(call, tau, scores);
}

}  // namespace pymerge
