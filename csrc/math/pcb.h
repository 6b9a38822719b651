// PCB-Merging (Du et al. 2024): competition within a task vector and between task vectors decides
// what of each parameter is kept, and with which weight.
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

PM_INLINE int pcb_pair(int i, int j, int count) {
  const int a = i < j ? i : j, b = i < j ? j : i;
  return a * count - a * (a - 1) / 2 + (b - a);
}

template <class F>
PM_INLINE F pcb_sign(F x) {
  const F one = splat<F>(1.0f);
  return (x > F{} ? one : F{}) - (x < F{} ? one : F{});
}

// x_ij of the paper.
template <class F>
PM_INLINE F pcb_product(const PcbCall& call, const F* tau, int i, int j) {
  const int pair = pcb_pair(i, j, call.num_models);
  return (tau[i] * tau[j] - splat<F>(call.pair_min[pair])) * splat<F>(call.pair_inv[pair]);
}

template <class F>
PM_INLINE F pcb_magnitude(const PcbCall& call, F tau, int i) {
  const F lo = splat<F>(call.lo[i]), hi = splat<F>(call.hi[i]);
  F a = bit_cast<F>(magnitude_key(tau));
  a = a < lo ? lo : a;
  return a > hi ? hi : a;
}

// sgn(tau_i) n_i
template <class F>
PM_INLINE F pcb_normal(const PcbCall& call, F tau, int i) {
  const F n = (pcb_magnitude(call, tau, i) - splat<F>(call.lo[i])) * splat<F>(call.inv[i]);
  return pcb_sign(tau) * n;
}

// tau: [num_models] -> scores: beta_i or b_i.
template <class F>
PM_INLINE void pcb_scores(const PcbCall& call, const F* tau, F* scores) {
  const int count = call.num_models;
  const F many = splat<F>(static_cast<float>(count));
  if (call.variant == PcbVariant::kPaper) {
    for (int i = 0; i < count; ++i) {
      F inter{};
      for (int j = 0; j < count; ++j) {
        const float z = call.pair_norm[pcb_pair(i, j, count)];
        inter = inter + exp32(pcb_product(call, tau, i, j)) * splat<F>(z);
      }
      const F intra = exp32(many * pcb_product(call, tau, i, i)) * splat<F>(call.norm[i]);
      scores[i] = intra * inter;
    }
    return;
  }
  F sum{};
  for (int j = 0; j < count; ++j) {
    sum = sum + (call.variant == PcbVariant::kRoot ? tau[j] : pcb_normal(call, tau[j], j));
  }
  for (int i = 0; i < count; ++i) {
    const F n = pcb_normal(call, tau[i], i);
    const F intra = exp32(many * (n * n));
    F inter{};
    if (call.variant == PcbVariant::kVisionEs) {
      for (int j = 0; j < count; ++j) {
        inter = inter + tanh32(n * pcb_normal(call, tau[j], j));
      }
    } else {
      inter = tanh32(tau[i] * sum);
    }
    scores[i] = intra * inter;
  }
}

template <class F>
PM_INLINE F pcb_merge(const PcbCall& call, F base, const F* tau, const F* scores) {
  const bool paper = call.variant == PcbVariant::kPaper;
  F sum{}, total{};
  for (int i = 0; i < call.num_models; ++i) {
    const F q = splat<F>(call.q[i]);
    F share;
    F value = tau[i];
    if (paper) {
      share = scores[i] >= q ? scores[i] : F{};
    } else {
      const F top = splat<F>(call.top[i]);
      F b = scores[i] < q ? q : scores[i];
      b = b > top ? top : b;
      share = call.top_inv[i] == 0 ? splat<F>(1.0f) : (b - q) * splat<F>(call.top_inv[i]);
      value = pcb_sign(tau[i]) * pcb_magnitude(call, tau[i], i);
    }
    sum = sum + (splat<F>(call.weights[i]) * value) * share;
    total = total + share;
  }
  const F least = splat<F>(1e-12f);
  const F merged = sum / (total < least ? least : total);
  return base + splat<F>(call.scale) * merged;
}

}  // namespace pymerge
