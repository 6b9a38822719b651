// Merges of sparse task vectors (csrc/math/sparse.h).
#pragma once

#include "cpu/kernels_weighted_sum.h"
#include "math/sparse.h"

namespace pymerge {
namespace {

constexpr int kUnrolledSparse = 4;

struct SparseKernel {
  SparseCall<F> call;
  bool band, drawn, elect;
  uint32_t start;  // the low half of the flat index of element 0
  F* values;
  I worst;
  int64_t at;

  template <class Io, int K, bool kBand, bool kDrawn, bool kElect, int Half>
  PM_INLINE F point(const SparseCall<F>& call, const char* const* in, int64_t bytes, U index,
                    F* values, I& worst) {
    const F base = Io::template load<Half>(in[0] + bytes);
    const auto load = [&](int k) { return Io::template load<Half>(in[k + 1] + bytes); };
    const U mixed = kDrawn ? mask_mix(index) : index;
    return sparse_point<K, kBand, kDrawn, kElect>(base, load, mixed, call, values, worst);
  }

  template <class Io, int K, bool kBand, bool kDrawn, bool kElect>
  void loop(const char* const* streams, char* out, int64_t n, Store store) {
    // Local copies of everything: what the stores write must not be able to change them.
    SparseCall<F> mine = call;
    constexpr int kRoom = K > 0 ? K : 1;
    int32_t lo[kRoom], last[kRoom];
    uint32_t seeds[2 * kRoom], limits[kRoom];
    float factors[kRoom], weights[kRoom];
    const char* in[K + 1];
    if (K > 0) {
      for (int k = 0; k < K; ++k) {
        lo[k] = call.lo[k];
        last[k] = call.last[k];
        seeds[2 * k] = call.seeds[2 * k];
        seeds[2 * k + 1] = call.seeds[2 * k + 1];
        limits[k] = call.limits[k];
        factors[k] = call.factors[k];
        weights[k] = call.weights[k];
      }
      for (int k = 0; k <= K; ++k) in[k] = streams[k];
      mine.lo = lo;
      mine.last = last;
      mine.seeds = seeds;
      mine.limits = limits;
      mine.factors = factors;
      mine.weights = weights;
    }
    const char* const* from = K > 0 ? in : streams;
    F* const room = values;
    I seen = worst;
    const U even = Io::template lanes<0>(), odd = Io::template lanes<1>();
    uint32_t index = start + static_cast<uint32_t>(at);
    for (int64_t i = 0; i < n; i += kStep, index += kStep) {
      const int64_t bytes = i * Io::kBytes;
      prefetch_ahead<Io, K == 0 ? 0 : K + 1>(from, bytes);
      const F a =
          point<Io, K, kBand, kDrawn, kElect, 0>(mine, from, bytes, even + index, room, seen);
      const F b =
          point<Io, K, kBand, kDrawn, kElect, 1>(mine, from, bytes, odd + index, room, seen);
      store_step<Io, false>(out, i, a, b, store);
    }
    worst = seen;
  }

  template <class Io, int K>
  void with_mode(const char* const* in, char* out, int64_t n, Store store) {
    if (elect) {
      band ? loop<Io, K, true, false, true>(in, out, n, store)
           : loop<Io, K, false, true, true>(in, out, n, store);
    } else {
      band ? loop<Io, K, true, false, false>(in, out, n, store)
           : loop<Io, K, false, true, false>(in, out, n, store);
    }
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    if (band && drawn) {
      elect ? loop<Io, 0, true, true, true>(in, out, n, store)
            : loop<Io, 0, true, true, false>(in, out, n, store);
    } else if (call.num_models > kUnrolledSparse) {
      with_mode<Io, 0>(in, out, n, store);
    } else {
      with_model_count<kUnrolledSparse>(call.num_models, [&](auto models) {
        with_mode<Io, decltype(models)::value>(in, out, n, store);
      });
    }
  }
};

// fp64: the same, one element at a time; the compiler finds no vectors here and need not.
struct Sparse64 {
  const SparseArgs* args;
  uint32_t start;
  bool nonfinite;
  int64_t at;

  // What a call by ranks makes of an element.
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

// By ranks: on converted blocks, whose lanes are in order as the ranks are.
struct RankedKernel {
  SparseCall<F> call;
  const SparseArgs* args;
  uint32_t start;
  F* values;
  I worst;
  int64_t at;

  template <int K, bool kElect>
  PM_INLINE F point(const RankedKernel& self, const SparseCall<F>& known, const char* const* in,
                    int64_t i, I& seen) {
    const F base = (F)load_bits(in[0] + 4 * i);
    const int64_t here = self.at + i;
    const U mixed = mask_mix(F32::lanes<0>() + (self.start + static_cast<uint32_t>(here)));
    const auto value = [&](int k) __attribute__((always_inline)) {
      const I rank = (I)load_bits(self.args->ranks + k * self.args->rank_stride + here);
      U hash{};
      if (known.chance) {
        hash = mask_hash_of(mixed ^ (U{} + known.seeds[2 * k]), U{} + known.seeds[2 * k + 1]);
      }
      const F x = (F)load_bits(in[k + 1] + 4 * i);
      return ranked_value(base, x, rank, (I)(hash >> 8), known, k, seen);
    };
    return sparse_merge_values<K, kElect>(base, value, known, self.values);
  }

  // K models, or 0: any number; what decides is known too.
  template <int K, bool kElect, bool kChance, bool kPerElement>
  void loop(const char* const* in, char* out, int64_t n) {
    SparseCall<F> known = call;
    if (K > 0) known.num_models = K;
    known.chance = kChance;
    known.per_element = kPerElement;
    I seen = worst;
    for (int64_t i = 0; i < n; i += kLanes) {
      store_bits(out + 4 * i, (U)point<K, kElect>(*this, known, in, i, seen));
    }
    worst = seen;
  }

  template <int K, bool kElect>
  void with_rule(const char* const* in, char* out, int64_t n) {
    if (!call.chance) return loop<K, kElect, false, false>(in, out, n);
    if (!call.per_element) return loop<K, kElect, true, false>(in, out, n);
    loop<K, kElect, true, true>(in, out, n);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    with_model_count<kUnrolledSparse>(call.num_models, [&](auto models) {
      constexpr int K = decltype(models)::value;
      args->elect != 0 ? with_rule<K, true>(in, out, n) : with_rule<K, false>(in, out, n);
    });
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
  const int64_t extra = static_cast<int64_t>(args.num_models) * PM_VECTOR_BYTES;
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
  F* values = reinterpret_cast<F*>(room.data - (streams.count() * 8 + 63) / 64 * 64 +
                                   Room::bytes(streams.count(), 4));
  if (args.ranks != nullptr) {
    RankedKernel kernel{call, &args, start, values, I{}, 0};
    run_mixed<Mixed32>(kernel, streams, room, begin, end);
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
    return Status::kBadArgument;  // the hash sees the low half; the caller mixes in the high one
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
    // Nothing is kept where the least key is above the largest that can be.
    const bool nothing = args->compute != Dtype::kF64 && args->lo[i] > INT32_MAX;
    lo[i] = nothing ? 1 : narrow_key(args->lo[i]);
    top[i] = nothing ? 0 : narrow_key(args->last[i]);
    const bool drawn = args->seeds != nullptr;
    seeds[2 * i] = drawn ? mask_mix(static_cast<uint32_t>(args->seeds[2 * i])) : 0;
    seeds[2 * i + 1] = drawn ? static_cast<uint32_t>(args->seeds[2 * i + 1]) : 0;
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
