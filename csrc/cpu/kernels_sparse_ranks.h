// Merges of sparse task vectors by ranks (csrc/math/sparse.h), and code that all sparse merges
// share.
#pragma once

#include "cpu/kernels_weighted_sum.h"
#include "math/sparse.h"

namespace pymerge {
namespace {

constexpr int kUnrolledSparse = 4;

// Local copies of a call's numbers, which the compiler knows that no store can change.
template <int K>
struct SparseNumbers {
  int32_t lo[K], last[K];
  uint32_t seeds[2 * K], limits[K];
  float factors[K], weights[K], chances[2 * K];

  // Copies the arrays of `call` and redirects it to the copies.
  explicit SparseNumbers(SparseCall<F>& call) {
    for (int k = 0; k < K; ++k) {
      lo[k] = call.lo[k];
      last[k] = call.last[k];
      limits[k] = call.limits[k];
      factors[k] = call.factors[k];
      weights[k] = call.weights[k];
      for (int j = 2 * k; j < 2 * k + 2; ++j) {
        seeds[j] = call.seeds[j];
        chances[j] = call.chances[j];
      }
    }
    call.lo = lo;
    call.last = last;
    call.seeds = seeds;
    call.limits = limits;
    call.factors = factors;
    call.weights = weights;
    call.chances = chances;
  }
};

// Makes broadcast numbers be read from memory where they are used, which costs nothing, rather than
// be kept in registers, which are too few.
template <class Numbers>
PM_INLINE void read_again(Numbers& numbers) {
  __asm__ volatile("" : "+m"(numbers));
}

// Merges the two halves of a step, model by model, so that neither waits for the other. term(half,
// k, delta) gives v_k. `seen` becomes non-finite if a delta is not finite, kept or not, or if the
// result may be NaN; large finite numbers may set it, too.
template <class Io, int K, Election kElect, class Term>
PM_INLINE void sparse_step(const char* const* in, int64_t bytes, const SparseCall<F>& call,
                           Term term, F (&seen)[2], F (&merged)[2]) {
  F base[2], v[2][K], s[2]{}, all[2];
  base[0] = Io::template load<0>(in[0] + bytes);
  base[1] = Io::template load<1>(in[0] + bytes);
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const auto add = [&](auto half) __attribute__((always_inline)) {
      constexpr int h = decltype(half)::value;
      const F delta = Io::template load<h>(in[k + 1] + bytes) - base[h];
      all[h] = k == 0 ? delta : all[h] + delta;
      v[h][k] = term(half, k, delta);
      s[h] = s[h] + v[h][k];
    };
    add(ModelCount<0>{});
    add(ModelCount<1>{});
  }
  for (int h = 0; h < 2; ++h) {
    seen[h] = seen[h] + (all[h] + s[h]);
    merged[h] = sparse_merge_finite<K, kElect>(base[h], v[h], s[h], call);
  }
}

// Prefetches the inputs of a nearby step, and the inputs and ranks of a distant one into the
// second-level cache. Ranks are most of the bytes; if they were prefetched closer, they would crowd
// out the data being loaded.
template <class Io, int K>
PM_INLINE void prefetch_ranked(const char* const* in, const int32_t* const* ranks, int64_t at) {
  constexpr int kFar = 4096;  // bytes
  prefetch_ahead<Io, K + 1>(in, at * Io::kBytes);
#pragma GCC unroll 9
  for (int k = 0; k <= K; ++k) {
    for (int line = 0; line < kStep * Io::kBytes; line += kLine) {
      __builtin_prefetch(in[k] + at * Io::kBytes + kFar + line, 0, 2);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const char* from = reinterpret_cast<const char*>(ranks[k] + at);
    for (int line = 0; line < kStep * 4; line += kLine) {
      __builtin_prefetch(from + kFar + line, 0, 2);
    }
  }
}

// Whether sparse_merge_finite is right for finite deltas. args: in the compute precision.
bool is_plain(const SparseCall<F>& call, float scale, float divisor) {
  float sum = 0;
  for (int k = 0; k < call.num_models; ++k) {
    sum += __builtin_fabsf(call.weights[k]);
    if (!__builtin_isfinite(call.factors[k])) return false;
    if (call.per_element && call.factors[k] != 1) return false;
  }
  return __builtin_isfinite(sum) && __builtin_isfinite(scale) && scale != 0 &&
         __builtin_isfinite(divisor) && divisor != 0;
}

// Ranks are in the order of elements; Io maps lanes to elements.
struct RankedKernel {
  SparseCall<F> call;
  const int32_t* ranks;  // [num_models][stride]
  int64_t stride;
  int32_t* padded;  // [num_models][kStep]
  uint32_t start;
  bool elect;
  bool plain;  // result of is_plain
  F* values;
  I worst;
  int64_t at;

  // Any numbers, any number of models; [begin, end).
  template <class Io, bool kElect>
  __attribute__((noinline)) void careful_loop(const char* const* in, char* out, int64_t begin,
                                              int64_t end, Store store, const int32_t* ranks,
                                              int64_t stride) {
    const SparseCall<F> mine = call;
    F* const room = values;
    I seen = worst;
    const auto point = [&](auto half, int64_t i) __attribute__((always_inline)) {
      constexpr int kHalf = decltype(half)::value;
      const F base = Io::template load<kHalf>(in[0] + i * Io::kBytes);
      const uint32_t index = start + static_cast<uint32_t>(at + i);
      const U mixed = mask_mix(Io::template lanes<kHalf>() + index);
      const auto value = [&](int k) __attribute__((always_inline)) {
        const I rank = Io::template in_lanes<kHalf>(ranks + k * stride + i);
        const F x = Io::template load<kHalf>(in[k + 1] + i * Io::kBytes);
        return ranked_value(base, x, rank, mixed, mine, k, seen);
      };
      return sparse_merge_values<kElect>(base, value, mine, room);
    };
    for (int64_t i = begin; i < end; i += kStep) {
      const F a = point(ModelCount<0>{}, i);
      const F b = point(ModelCount<1>{}, i);
      store_step<Io, false>(out, i, a, b, store);
    }
    worst = seen;
  }

  template <class Io>
  void careful(const char* const* in, char* out, int64_t begin, int64_t end, Store store,
               const int32_t* ranks, int64_t stride) {
    elect ? careful_loop<Io, true>(in, out, begin, end, store, ranks, stride)
          : careful_loop<Io, false>(in, out, begin, end, store, ranks, stride);
  }

  template <class Io, int K, RankRule kRule, Election kElect>
  void loop(const char* const* streams, char* out, int64_t n, Store store, const int32_t* ranks,
            int64_t stride) {
    SparseCall<F> mine = call;
    SparseNumbers<K> numbers(mine);
    const char* in[K + 1];
    const int32_t* from[K];
    for (int k = 0; k <= K; ++k) in[k] = streams[k];
    for (int k = 0; k < K; ++k) from[k] = ranks + k * stride;
    const uint32_t begin = start + static_cast<uint32_t>(at);
    U even = Io::template lanes<0>() + begin, odd = Io::template lanes<1>() + begin;
    for (int64_t first = 0; first < n; first += kCheckSteps * kStep) {
      const int64_t end = n - first < kCheckSteps * kStep ? n : first + kCheckSteps * kStep;
      F seen[2]{};
      for (int64_t i = first; i < end; i += kStep) {
        prefetch_ranked<Io, K>(in, from, i);
        U mixed[2] = {even, odd};
        if (kRule != RankRule::kBand) mixed[0] = mask_mix(even), mixed[1] = mask_mix(odd);
        const auto term = [&](auto half, int k, F delta) __attribute__((always_inline)) {
          constexpr int kHalf = decltype(half)::value;
          const I rank = Io::template in_lanes<kHalf>(from[k] + i);
          return sparse_term_by_rank<kRule>(delta, rank, mixed[kHalf], mine, k);
        };
        F merged[2];
        sparse_step<Io, K, kElect>(in, i * Io::kBytes, mine, term, seen, merged);
        read_again(numbers);
        even += kStep;
        odd += kStep;
        store_step<Io, true>(out, i, merged[0], merged[1], store);
      }
      if (has_nonfinite(magnitude_key(seen[0] + seen[1]))) {
        careful<Io>(streams, out, first, end, store, ranks, stride);
      }
    }
  }

  template <class Io, int K, RankRule kRule>
  void with_election(const char* const* in, char* out, int64_t n, Store store, const int32_t* ranks,
                     int64_t stride) {
    elect ? loop<Io, K, kRule, Election::kMean>(in, out, n, store, ranks, stride)
          : loop<Io, K, kRule, Election::kNone>(in, out, n, store, ranks, stride);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    const int32_t* from = ranks + at;
    int64_t apart = stride;
    if (at + n > stride) {  // a tail, which ends before a whole step does
      for (int k = 0; k < call.num_models; ++k) {
        std::memset(padded + k * kStep, 0, sizeof(int32_t) * kStep);
        std::memcpy(padded + k * kStep, from + k * stride,
                    sizeof(int32_t) * static_cast<size_t>(stride - at));
      }
      from = padded;
      apart = kStep;
    }
    with_model_count<kUnrolledSparse>(plain ? call.num_models : 0, [&](auto models) {
      constexpr int K = decltype(models)::value;
      if constexpr (K == 0) {
        careful<Io>(in, out, 0, n, store, from, apart);
      } else if (!call.chance) {
        with_election<Io, K, RankRule::kBand>(in, out, n, store, from, apart);
      } else if (!call.per_element) {
        with_election<Io, K, RankRule::kChance>(in, out, n, store, from, apart);
      } else {
        with_election<Io, K, RankRule::kPerElement>(in, out, n, store, from, apart);
      }
    });
  }
};

// fp16 goes through converted blocks: it would add a third of the code of these loops.
void run_ranked(RankedKernel& kernel, const Streams& streams, Room& room, int64_t begin,
                int64_t end) {
  Dtype dtype;
  const bool uniform = streams.uniform(&dtype);
  if (uniform && dtype == Dtype::kBF16) {
    run_uniform<Bf16>(kernel, streams, room, begin, end);
  } else if (uniform && dtype == Dtype::kF32) {
    run_uniform<F32>(kernel, streams, room, begin, end);
  } else {
    run_mixed<Mixed32>(kernel, streams, room, begin, end);
  }
}

}  // namespace
}  // namespace pymerge
