// Merges of sparse task vectors: random drops (DARE, Yu et al. 2024), bands of magnitude
// (Breadcrumbs, Davari & Belilovsky 2024), with or without an election of signs.
//
//   t_k = lo_k <= bits(|x_k - base|) <= last_k and drawn_k ? x_k - base : 0
//         or, by the rank r of |x_k - base| in its row: lo_k <= r <= last_k (Breadcrumbs' code), or
//         drawn with probability p = first_k + r spread_k, and divided by it or not (DELLA, Deep et
//         al. 2024)
//   v_k = w_k (f_k t_k)
//   s   = sum_k v_k, k = 0 .. K-1 in order
//   m   = s / divisor                                                   without election
//   m   = sum of the v_k of the sign of s (0 elects +) / sum of their w_k or nothing, else
//   out = base + scale m
#pragma once

#include "math/value.h"

namespace pymerge {

// A number in [0, 2^32) from an element's flat index (its low half) and two words of a seed: rounds
// of xor-shift and multiply; the second word enters between them, so that models do not share a
// shifted sequence. The upper bits are the random ones. U is an unsigned vector or integer of 32
// bits.
template <class U>
PM_INLINE U mask_mix(U x) {
  return x ^ (x >> 16);
}

// Of the index, mixed, and the first word, mixed, xor-ed: the models of an element share the one,
// the elements of a model the other.
template <class U>
PM_INLINE U mask_hash_of(U mixed, U second) {
  U x = mixed * 0x7feb352du + second;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return (x ^ (x >> 15)) * 0x9e3779b1u;
}

template <class U>
PM_INLINE U mask_hash(U index, U first, U second) {
  return mask_hash_of(mask_mix(index) ^ mask_mix(first), second);
}

template <class F>
struct SparseCall {
  using Scalar = typename Traits<F>::Scalar;
  using IntScalar = typename Traits<F>::IntScalar;
  const IntScalar* lo;     // [num_models] least and largest key that is kept
  const IntScalar* last;   // [num_models]
  const uint32_t* seeds;   // [num_models][2], the first of each mixed: mask_mix
  const uint32_t* limits;  // [num_models] kept where the hash is at most this
  const Scalar* factors;   // [num_models]
  const Scalar* weights;   // [num_models]
  int num_models;
  bool divide;  // by the weights of those that agree with the election, else by divisor
  bool divide_by_divisor;
  F divisor;
  F scale;
  bool bare;              // the merge alone, without the base
  bool chance;            // by ranks: drawn with probabilities from chances
  bool per_element;       // and divided by them
  const Scalar* chances;  // [num_models][2]: first, spread
};

template <class F>
PM_INLINE F sparse_finish(F base, F merged, const SparseCall<F>& call) {
  const F added = call.scale * merged;
  return call.bare ? added : base + added;
}

// v_k by ranks. draw: the upper 24 bits of the element's hash.
template <class F>
PM_INLINE F ranked_value(F base, F x, typename Traits<F>::Bits rank, typename Traits<F>::Bits draw,
                         const SparseCall<F>& call, int k, typename Traits<F>::Bits& worst) {
  using T = Traits<F>;
  const F delta = x - base;
  const auto key = magnitude_key(delta);
  worst = key > worst ? key : worst;
  F t = delta;
  if (call.chance) {
    const F drawn = to_float<F>(draw) * splat<F>(0x1p-24f);
    const F spread = splat<F>(call.chances[2 * k + 1]);
    const F p = splat<F>(call.chances[2 * k]) + to_float<F>(rank) * spread;
    t = drawn < p ? delta : F{};
    if (call.per_element) t = drawn < p ? t / p : F{};
  } else {
    t = T::keep(delta, T::both(T::at_least(rank, splat_bits<F>(call.lo[k])),
                               T::at_least(splat_bits<F>(call.last[k]), rank)));
  }
  return splat<F>(call.weights[k]) * (splat<F>(call.factors[k]) * t);
}

// One term: v_k. mixed: mask_mix of the index, read where kDrawn.
template <bool kBand, bool kDrawn, class F, class U>
PM_INLINE F sparse_value(F base, F x, U mixed, const SparseCall<F>& call, int k,
                         typename Traits<F>::Bits& worst) {
  using T = Traits<F>;
  const F delta = x - base;
  const auto key = magnitude_key(delta);
  worst = key > worst ? key : worst;
  typename T::Mask kept;
  if (kBand) {
    kept = T::both(T::at_least(key, splat_bits<F>(call.lo[k])),
                   T::at_least(splat_bits<F>(call.last[k]), key));
  }
  if (kDrawn) {
    const U hash = mask_hash_of(mixed ^ (U{} + call.seeds[2 * k]), U{} + call.seeds[2 * k + 1]);
    const auto drawn = T::at_most(hash, U{} + call.limits[k]);
    kept = kBand ? T::both(kept, drawn) : drawn;
  }
  return splat<F>(call.weights[k]) * (splat<F>(call.factors[k]) * T::keep(delta, kept));
}

// The merge of what value(k) gives: v_k.
template <int K, bool kElect, class F, class Value>
PM_INLINE F sparse_merge_values(F base, Value value, const SparseCall<F>& call, F* values) {
  using T = Traits<F>;
  F own[K > 0 ? K : 1];
  F* v = K > 0 ? own : values;
  const int count = K > 0 ? K : call.num_models;
  F s{};
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) {
    const F one = value(k);
    if (kElect) v[k] = one;
    s = s + one;
  }
  if (!kElect) {
    if (call.divide_by_divisor) s = s / call.divisor;
    return sparse_finish(base, s, call);
  }
  // s begins with +0 and so is never -0: its sign bit is what is elected.
  const auto sign = bit_cast<typename T::Bits>(s) & T::kSignMask;
  F sum{}, divisor{};
#pragma GCC unroll 8
  for (int k = 0; k < count; ++k) {
    const F u = bit_cast<F>(bit_cast<typename T::Bits>(v[k]) ^ sign);
    const auto agrees = T::positive(u, T::everything());
    sum = T::add(sum, u, agrees);
    divisor = T::add(divisor, splat<F>(call.weights[k]), agrees);
  }
  if (call.divide) sum = sum / (divisor == F{} ? splat<F>(1) : divisor);
  if (call.divide_by_divisor) sum = sum / call.divisor;
  F merged = bit_cast<F>(bit_cast<typename T::Bits>(sum) ^ sign);
  merged = s != s ? s : merged;
  return sparse_finish(base, merged, call);
}

// load(k) gives theta_k; `values` has room for num_models values where K is 0 (any number).
template <int K, bool kBand, bool kDrawn, bool kElect, class F, class U, class Load>
PM_INLINE F sparse_point(F base, Load load, U mixed, const SparseCall<F>& call, F* values,
                         typename Traits<F>::Bits& worst) {
  const auto value = [&](int k) __attribute__((always_inline)) {
    return sparse_value<kBand, kDrawn>(base, load(k), mixed, call, k, worst);
  };
  return sparse_merge_values<K, kElect>(base, value, call, values);
}

}  // namespace pymerge
