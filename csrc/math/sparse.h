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

#include <cstdint>

#include "math/value.h"

namespace pymerge {

// A number in [0, 2^32) from an element's flat index (its low half) and two words of a seed. The
// index is mixed by rounds of xor-shift and multiply. This is a permutation, which all models share
// for an element. Each model maps the mixed index through a line of its own, whose words are as
// good as random. The lines of two models agree no more than random numbers do: they correlate if n
// a + m b = 0 for small n and m, which holds for only a few of the 2^32 slopes. The upper bits are
// the random ones. U is an unsigned vector or integer of 32 bits.
template <class U>
PM_INLINE U mask_mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// A slope is odd, so that the line takes every number once.
PM_INLINE uint32_t mask_slope(uint32_t second) { return second | 1; }

template <class U>
PM_INLINE U mask_hash_of(U mixed, U first, U slope) {
  return mixed * slope + first;
}

template <class U>
PM_INLINE U mask_hash(U index, uint32_t first, uint32_t second) {
  return mask_hash_of(mask_mix(index), U{} + first, U{} + mask_slope(second));
}

template <class F>
struct SparseCall {
  using Scalar = typename Traits<F>::Scalar;
  using IntScalar = typename Traits<F>::IntScalar;
  const IntScalar* lo;     // [num_models] smallest and largest key that is kept
  const IntScalar* last;   // [num_models]
  const uint32_t* seeds;   // [num_models][2], the second word as returned by mask_slope
  const uint32_t* limits;  // [num_models] an element is kept if its hash is at most this
  const Scalar* factors;   // [num_models]
  const Scalar* weights;   // [num_models]
  int num_models;
  bool divide;  // by the weights that agree with the election, else by divisor
  bool divide_by_divisor;
  F divisor;
  F scale;
  bool bare;              // the merge alone, without the base
  bool chance;            // by ranks: elements are drawn with probabilities from chances
  bool per_element;       // and divided by them
  const Scalar* chances;  // [num_models][2]: first, spread
};

template <class F>
PM_INLINE F sparse_finish(F base, F merged, const SparseCall<F>& call) {
  const F added = call.scale * merged;
  return call.bare ? added : base + added;
}

// How ranks decide: a band of ranks is kept, or elements are drawn by chance, and divided by their
// chance or not.
enum class RankRule { kBand, kChance, kPerElement };

// Whether model k keeps an element of this rank; share: its chance, if there is one.
template <RankRule kRule, class F, class U>
PM_INLINE typename Traits<F>::Mask keeps_rank(typename Traits<F>::Bits rank, U mixed,
                                              const SparseCall<F>& call, int k, F& share) {
  using T = Traits<F>;
  if (kRule == RankRule::kBand) {
    return T::between(rank, splat_bits<F>(call.lo[k]), splat_bits<F>(call.last[k]));
  }
  const U hash = mask_hash_of(mixed, U{} + call.seeds[2 * k], U{} + call.seeds[2 * k + 1]);
  const F drawn = to_float<F>(bit_cast<typename T::Bits>(hash >> 8)) * splat<F>(0x1p-24f);
  const F spread = splat<F>(call.chances[2 * k + 1]);
  share = splat<F>(call.chances[2 * k]) + to_float<F>(rank) * spread;
  return T::greater(share, drawn);
}

// v_k by ranks, for any numbers.
template <class F, class U>
PM_INLINE F ranked_value(F base, F x, typename Traits<F>::Bits rank, U mixed,
                         const SparseCall<F>& call, int k, typename Traits<F>::Bits& worst) {
  using T = Traits<F>;
  F t = x - base;
  const auto key = magnitude_key(t);
  worst = key > worst ? key : worst;
  F share{};
  const auto kept = call.chance ? keeps_rank<RankRule::kChance>(rank, mixed, call, k, share)
                                : keeps_rank<RankRule::kBand>(rank, mixed, call, k, share);
  if (call.per_element) t = t / share;
  return splat<F>(call.weights[k]) * (splat<F>(call.factors[k]) * T::keep(t, kept));
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
    const U hash = mask_hash_of(mixed, U{} + call.seeds[2 * k], U{} + call.seeds[2 * k + 1]);
    const auto drawn = T::at_most(hash, U{} + call.limits[k]);
    kept = kBand ? T::both(kept, drawn) : drawn;
  }
  return splat<F>(call.weights[k]) * (splat<F>(call.factors[k]) * T::keep(delta, kept));
}

// Merges the terms v_k = value(k), for any numbers; `values` has room for num_models values.
template <bool kElect, class F, class Value>
PM_INLINE F sparse_merge_values(F base, Value value, const SparseCall<F>& call, F* values) {
  using T = Traits<F>;
  F s{};
  for (int k = 0; k < call.num_models; ++k) {
    const F one = value(k);
    if (kElect) values[k] = one;
    s = s + one;
  }
  if (!kElect) {
    if (call.divide_by_divisor) s = s / call.divisor;
    return sparse_finish(base, s, call);
  }
  // s begins with +0 and so is never -0: its sign bit is the elected sign.
  const auto sign = bit_cast<typename T::Bits>(s) & T::kSignMask;
  F sum{}, divisor{};
  for (int k = 0; k < call.num_models; ++k) {
    const F u = bit_cast<F>(bit_cast<typename T::Bits>(values[k]) ^ sign);
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

// load(k) returns theta_k; worst: the largest key of a delta.
template <bool kBand, bool kDrawn, bool kElect, class F, class U, class Load>
PM_INLINE F sparse_point(F base, Load load, U mixed, const SparseCall<F>& call, F* values,
                         typename Traits<F>::Bits& worst) {
  const auto value = [&](int k) __attribute__((always_inline)) {
    return sparse_value<kBand, kDrawn>(base, load(k), mixed, call, k, worst);
  };
  return sparse_merge_values<kElect>(base, value, call, values);
}

// How an election merges: without one; the sum of the values that agree; or that sum divided by
// their weights if call.divide is set.
enum class Election { kNone, kSum, kMean };

// Below: finite numbers, K known at compile time. Factors, weights and their sum, scale and divisor
// must be finite, scale and divisor not 0. A v_k is +0 where nothing is kept, and plays no part.

// v_k by keys and hashes.
template <bool kBand, bool kDrawn, class F, class U>
PM_INLINE F sparse_term_by_key(F delta, U mixed, const SparseCall<F>& call, int k) {
  using T = Traits<F>;
  typename T::Mask kept;
  if (kBand) {
    kept = T::between(magnitude_key(delta), splat_bits<F>(call.lo[k]), splat_bits<F>(call.last[k]));
  }
  if (kDrawn) {
    const U hash = mask_hash_of(mixed, U{} + call.seeds[2 * k], U{} + call.seeds[2 * k + 1]);
    const auto drawn = T::at_most(hash, U{} + call.limits[k]);
    kept = kBand ? T::both(kept, drawn) : drawn;
  }
  return T::keep(splat<F>(call.weights[k]) * (splat<F>(call.factors[k]) * delta), kept);
}

// v_k by ranks; with kPerElement all factors must be 1.
template <RankRule kRule, class F, class U>
PM_INLINE F sparse_term_by_rank(F delta, typename Traits<F>::Bits rank, U mixed,
                                const SparseCall<F>& call, int k) {
  F share{};
  const auto kept = keeps_rank<kRule>(rank, mixed, call, k, share);
  // Where nothing is kept, the quotient may be anything.
  const F t = kRule == RankRule::kPerElement ? delta / share : splat<F>(call.factors[k]) * delta;
  return Traits<F>::keep(splat<F>(call.weights[k]) * t, kept);
}

// The merge of v_0 .. v_K-1, whose sum is s. Sums begin with +0 and so are never -0.
template <int K, Election kElect, class F>
PM_INLINE F sparse_merge_finite(F base, const F (&v)[K], F s, const SparseCall<F>& call) {
  using T = Traits<F>;
  using Bits = typename T::Bits;
  F merged = s;
  if (kElect != Election::kNone) {
    const Bits sign = bit_cast<Bits>(s) & T::kSignMask;
    F sum{}, divisor{};
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const F u = bit_cast<F>(bit_cast<Bits>(v[k]) ^ sign);
      const auto agrees = T::positive(u, T::everything());
      sum = k == 0 ? T::keep(u, agrees) : T::add(sum, u, agrees);
      if (kElect == Election::kMean) {
        const F weight = splat<F>(call.weights[k]);
        divisor = k == 0 ? T::keep(weight, agrees) : T::add(divisor, weight, agrees);
      }
    }
    if (kElect == Election::kMean && call.divide) {
      sum = sum / (divisor == F{} ? splat<F>(1) : divisor);
    }
    merged = bit_cast<F>(bit_cast<Bits>(sum) ^ sign);
  }
  if (call.divide_by_divisor) merged = merged / call.divisor;
  return sparse_finish(base, merged, call);
}

}  // namespace pymerge
