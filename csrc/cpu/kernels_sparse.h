// Merges of sparse task vectors (csrc/math/sparse.h).
#pragma once

#include "cpu/kernels_sparse_ranks.h"

namespace pymerge {
namespace {

struct SparseKernel {
  SparseCall<F> call;
  bool band, drawn, elect;
  bool plain;      // result of is_plain
  uint32_t start;  // the low half of the flat index of element 0
  F* values;
  I worst;
  int64_t at;

  // Any numbers, any number of models; [begin, end).
  template <class Io, bool kBand, bool kDrawn, bool kElect>
  __attribute__((noinline)) void careful_loop(const char* const* in, char* out, int64_t begin,
                                              int64_t end, Store store) {
    const SparseCall<F> mine = call;
    F* const room = values;
    I seen = worst;
    uint32_t index = start + static_cast<uint32_t>(at + begin);
    const auto point = [&](auto half, int64_t bytes) __attribute__((always_inline)) {
      constexpr int kHalf = decltype(half)::value;
      const F base = Io::template load<kHalf>(in[0] + bytes);
      const auto load = [&](int k) { return Io::template load<kHalf>(in[k + 1] + bytes); };
      const U lanes = Io::template lanes<kHalf>() + index;
      const U mixed = kDrawn ? mask_mix(lanes) : lanes;
      return sparse_point<kBand, kDrawn, kElect>(base, load, mixed, mine, room, seen);
    };
    for (int64_t i = begin; i < end; i += kStep, index += kStep) {
      const F a = point(ModelCount<0>{}, i * Io::kBytes);
      const F b = point(ModelCount<1>{}, i * Io::kBytes);
      store_step<Io, false>(out, i, a, b, store);
    }
    worst = seen;
  }

  template <class Io, bool kBand, bool kDrawn>
  void careful(const char* const* in, char* out, int64_t begin, int64_t end, Store store) {
    elect ? careful_loop<Io, kBand, kDrawn, true>(in, out, begin, end, store)
          : careful_loop<Io, kBand, kDrawn, false>(in, out, begin, end, store);
  }

  // Finite numbers, at most kCheckSteps steps: accumulates into `seen`.
  template <class Io, int K, bool kBand, bool kDrawn, Election kElect>
  PM_INLINE void finite_steps(const SparseCall<F>& call, const char* const* in, char* out,
                              int64_t begin, int64_t end, Store store, U index, F (&seen)[2]) {
    U even = Io::template lanes<0>() + index, odd = Io::template lanes<1>() + index;
    for (int64_t i = begin; i < end; i += kStep) {
      const int64_t bytes = i * Io::kBytes;
      prefetch_ahead<Io, K + 1>(in, bytes);
      U mixed[2] = {even, odd};
      if (kDrawn) mixed[0] = mask_mix(even), mixed[1] = mask_mix(odd);
      const auto term = [&](auto half, int k, F delta) __attribute__((always_inline)) {
        return sparse_term_by_key<kBand, kDrawn>(delta, mixed[decltype(half)::value], call, k);
      };
      F merged[2];
      sparse_step<Io, K, kElect>(in, bytes, call, term, seen, merged);
      even += kStep;
      odd += kStep;
      store_step<Io, true>(out, i, merged[0], merged[1], store);
    }
  }

  template <class Io, int K, bool kBand, bool kDrawn, Election kElect>
  void loop(const char* const* streams, char* out, int64_t n, Store store) {
    SparseCall<F> mine = call;
    const SparseNumbers<K> numbers(mine);
    const char* in[K + 1];
    for (int k = 0; k <= K; ++k) in[k] = streams[k];
    const uint32_t first = start + static_cast<uint32_t>(at);
    for (int64_t i = 0; i < n; i += kCheckSteps * kStep) {
      const int64_t end = n - i < kCheckSteps * kStep ? n : i + kCheckSteps * kStep;
      F seen[2]{};
      finite_steps<Io, K, kBand, kDrawn, kElect>(mine, in, out, i, end, store,
                                                 U{} + (first + static_cast<uint32_t>(i)), seen);
      if (has_nonfinite(magnitude_key(seen[0] + seen[1]))) {
        careful<Io, kBand, kDrawn>(streams, out, i, end, store);
      }
    }
  }

  template <class Io, int K, bool kBand, bool kDrawn>
  void with_election(const char* const* in, char* out, int64_t n, Store store) {
    if (!elect) return loop<Io, K, kBand, kDrawn, Election::kNone>(in, out, n, store);
    if (!call.divide) return loop<Io, K, kBand, kDrawn, Election::kSum>(in, out, n, store);
    loop<Io, K, kBand, kDrawn, Election::kMean>(in, out, n, store);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    if (band && drawn) return careful<Io, true, true>(in, out, 0, n, store);
    with_model_count<kUnrolledSparse>(plain ? call.num_models : 0, [&](auto models) {
      constexpr int K = decltype(models)::value;
      if constexpr (K > 0) {
        band ? with_election<Io, K, true, false>(in, out, n, store)
             : with_election<Io, K, false, true>(in, out, n, store);
      } else {
        band ? careful<Io, true, false>(in, out, 0, n, store)
             : careful<Io, false, true>(in, out, 0, n, store);
      }
    });
  }
};

// fp64: the same, one element at a time; the compiler finds no vectors here and need not.
struct Sparse64 {
  const SparseArgs* args;
  uint32_t start;
  bool nonfinite;
  int64_t at;

  // The term of one element in a call by ranks.
  double ranked(double delta, uint32_t hash, int64_t i, int k) const {
    const int32_t rank = args->ranks[k * args->rank_stride + at + i];
    if (args->chances == nullptr) return rank >= args->lo[k] && rank <= args->last[k] ? delta : 0.0;
    const double drawn = static_cast<double>(hash >> 8) * 0x1p-24;
    const double p = args->chances[2 * k] + rank * args->chances[2 * k + 1];
    if (!(drawn < p)) return 0.0;
    return args->per_element != 0 ? delta / p : delta;
  }

  double value(const char* const* in, int64_t i, int k, double base) {
    const double x = reinterpret_cast<const double*>(in[k + 1])[i];
    const double delta = x - base;
    int64_t key;
    std::memcpy(&key, &delta, 8);
    key &= INT64_MAX;
    nonfinite = nonfinite || key >= Traits<D>::kInfinity;
    uint32_t hash = 0;
    if (args->seeds != nullptr) {
      const uint32_t index = start + static_cast<uint32_t>(at + i);
      const auto first = static_cast<uint32_t>(args->seeds[2 * k]);
      const auto second = static_cast<uint32_t>(args->seeds[2 * k + 1]);
      hash = mask_hash(index, first, second);
    }
    if (args->ranks != nullptr) {
      return args->weights[k] * (args->factors[k] * ranked(delta, hash, i, k));
    }
    const bool drawn = args->seeds == nullptr || static_cast<int64_t>(hash) <= args->limits[k];
    const bool kept = drawn && key >= args->lo[k] && key <= args->last[k];
    const double trimmed = kept ? delta : 0.0;
    return args->weights[k] * (args->factors[k] * trimmed);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    for (int64_t i = 0; i < n; ++i) {
      const double base = reinterpret_cast<const double*>(in[0])[i];
      double s = 0;
      for (int k = 0; k < args->num_models; ++k) s = s + value(in, i, k, base);
      double merged = s;
      if (args->elect != 0) {
        const bool negative = __builtin_signbit(s) != 0;
        double sum = 0, divisor = 0;
        for (int k = 0; k < args->num_models; ++k) {
          const double v = value(in, i, k, base);
          const double u = negative ? -v : v;
          if (!(u <= 0)) {
            sum = sum + u;
            divisor = divisor + args->weights[k];
          }
        }
        if (args->divide != 0) sum = sum / (divisor == 0 ? 1.0 : divisor);
        if (args->divisor != 1.0) sum = sum / args->divisor;
        merged = s != s ? s : negative ? -sum : sum;
      } else if (args->divisor != 1.0) {
        merged = merged / args->divisor;
      }
      const double added = args->scale * merged;
      reinterpret_cast<double*>(out)[i] = args->bare != 0 ? added : base + added;
    }
  }
};

struct SparseContext {
  const SparseArgs* args;
  const int32_t* lo;
  const int32_t* last;
  const uint32_t* seeds;
  const uint32_t* limits;
  const float* factors;
  const float* weights;
  const float* chances;
  int32_t failed, nonfinite;
};

void sparse_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<SparseContext*>(opaque);
  const SparseArgs& args = *context.args;
  const Streams streams{&args.base, args.models, args.num_models, args.out, args.compute};
  const bool wide = args.compute == Dtype::kF64;
  // Terms of the models, and ranks of one step.
  const int64_t extra = static_cast<int64_t>(args.num_models) * (PM_VECTOR_BYTES + 4 * kStep);
  Room room;
  if (!room.take(streams.count(), wide ? 8 : 4, extra)) return set_flag(&context.failed);
  const auto start = static_cast<uint32_t>(args.start);
  if (wide) {
    Sparse64 kernel{&args, start, false, 0};
    run_mixed<Mixed64>(kernel, streams, room, begin, end);
    if (kernel.nonfinite) set_flag(&context.nonfinite);
    return;
  }
  SparseCall<F> call{};
  call.lo = context.lo;
  call.last = context.last;
  call.seeds = context.seeds;
  call.limits = context.limits;
  call.factors = context.factors;
  call.weights = context.weights;
  call.num_models = args.num_models;
  call.divide = args.divide != 0;
  call.divide_by_divisor = args.divisor != 1.0;
  call.divisor = splat<F>(static_cast<float>(args.divisor));
  call.scale = splat<F>(static_cast<float>(args.scale));
  call.bare = args.bare != 0;
  call.chance = args.chances != nullptr;
  call.per_element = args.per_element != 0;
  call.chances = context.chances;
  F* values = reinterpret_cast<F*>(room.more);
  const bool plain =
      is_plain(call, static_cast<float>(args.scale), static_cast<float>(args.divisor));
  if (args.ranks != nullptr) {
    RankedKernel kernel{};
    kernel.call = call;
    kernel.ranks = args.ranks;
    kernel.stride = args.rank_stride;
    kernel.padded = reinterpret_cast<int32_t*>(values + args.num_models);
    kernel.start = start;
    kernel.elect = args.elect != 0;
    kernel.plain = plain;
    kernel.values = values;
    run_ranked(kernel, streams, room, begin, end);
    if (has_nonfinite(kernel.worst)) set_flag(&context.nonfinite);
    return;
  }
  SparseKernel kernel{};
  kernel.call = call;
  kernel.drawn = args.seeds != nullptr;
  kernel.elect = args.elect != 0;
  for (int k = 0; k < args.num_models; ++k) {
    kernel.band = kernel.band || context.last[k] != INT32_MAX || context.lo[k] > 0;
  }
  kernel.band = kernel.band || !kernel.drawn;
  kernel.start = start;
  kernel.values = values;
  kernel.plain = plain;
  run_range(kernel, streams, room, begin, end);
  if (has_nonfinite(kernel.worst)) set_flag(&context.nonfinite);
}

int32_t narrow_key(int64_t key) { return static_cast<int32_t>(key > INT32_MAX ? INT32_MAX : key); }

Status sparse_merge(const SparseArgs* args) {
  const int64_t k = args->num_models;
  if (k < 1 || args->numel < 0 || args->start < 0 || args->base.data == nullptr) {
    return Status::kBadArgument;
  }
  const int64_t last = args->start + args->numel - 1;
  if (args->seeds != nullptr && last >> 32 != args->start >> 32 && args->numel > 0) {
    return Status::kBadArgument;  // the hash uses the low half; the caller mixes in the high one
  }
  const int64_t padded = (args->numel + kScoreAlignment - 1) / kScoreAlignment * kScoreAlignment;
  if (args->ranks != nullptr &&
      (args->rank_stride < padded || (args->chances != nullptr && args->seeds == nullptr))) {
    return Status::kBadArgument;
  }
  const int64_t bytes = k * 4 * 9;
  char* memory = static_cast<char*>(__builtin_malloc(static_cast<size_t>(bytes)));
  if (memory == nullptr) return Status::kOutOfMemory;
  auto* lo = reinterpret_cast<int32_t*>(memory);
  int32_t* top = lo + k;
  auto* seeds = reinterpret_cast<uint32_t*>(top + k);
  uint32_t* limits = seeds + 2 * k;
  auto* factors = reinterpret_cast<float*>(limits + k);
  float* weights = factors + k;
  float* chances = weights + k;
  for (int64_t i = 0; i < k; ++i) {
    // Nothing is kept if the least key is above the largest possible key.
    const bool nothing = args->compute != Dtype::kF64 && args->lo[i] > INT32_MAX;
    lo[i] = nothing ? 1 : narrow_key(args->lo[i]);
    top[i] = nothing ? 0 : narrow_key(args->last[i]);
    const bool drawn = args->seeds != nullptr;
    seeds[2 * i] = drawn ? static_cast<uint32_t>(args->seeds[2 * i]) : 0;
    seeds[2 * i + 1] = drawn ? mask_slope(static_cast<uint32_t>(args->seeds[2 * i + 1])) : 0;
    for (int64_t j = 2 * i; j < 2 * i + 2; ++j) {
      chances[j] = args->chances == nullptr ? 0.0f : static_cast<float>(args->chances[j]);
    }
    const bool limited = args->seeds != nullptr && args->chances == nullptr;
    limits[i] = limited ? static_cast<uint32_t>(args->limits[i]) : UINT32_MAX;
    factors[i] = static_cast<float>(args->factors[i]);
    weights[i] = static_cast<float>(args->weights[i]);
  }
  SparseContext context{args, lo, top, seeds, limits, factors, weights, chances, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, sparse_range, &context);
  __builtin_free(memory);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
