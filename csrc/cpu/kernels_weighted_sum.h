// weighted_sum, and the streaming floor, which is the benchmark baseline of all kernels.
#pragma once

#include "cpu/elementwise.h"
#include "math/weighted_sum.h"

namespace pymerge {
namespace {

template <class Io, bool kFinite>
PM_INLINE void store_step(char* out, int64_t i, F a, F b, Store store) {
  if (store == Store::kStream) {
    Io::template store<true, kFinite>(out + i * Io::kBytes, a, b);
  } else if (store == Store::kCached) {
    Io::template store<false, kFinite>(out + i * Io::kBytes, a, b);
  }
}

// Finite numbers take a faster path. After every kCheckSteps steps the kernel checks whether all
// were finite; if not, it redoes these steps, whose inputs are still in the cache. No output
// overlaps an input.
constexpr int64_t kCheckSteps = 128;

constexpr int kUnrolledModels = 16;

template <int K>
struct ModelCount {
  static constexpr int value = K;
};

// Calls function(ModelCount<k>) for k in 1..16, and function(ModelCount<0>) for any other k.
template <int K = kUnrolledModels, class Function>
PM_INLINE void with_model_count(int k, Function&& function) {
  if constexpr (K == 0) {
    function(ModelCount<0>{});
  } else {
    if (k == K) {
      function(ModelCount<K>{});
    } else {
      with_model_count<K - 1>(k, function);
    }
  }
}

struct WeightedSumKernel {
  const float* weights;
  int num_models;
  bool has_base, divide;
  float divisor, scale;
  I worst;

  template <class Io, int K, bool kBase, int Half>
  PM_INLINE F point(const WeightedSumKernel& call, const char* const* in, int64_t at) {
    const int count = K > 0 ? K : call.num_models;
    const F base = kBase ? Io::template load<Half>(in[0] + at) : F{};
    F sum{};
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) {
      F x = Io::template load<Half>(in[k + (kBase ? 1 : 0)] + at);
      if (kBase) x = x - base;
      sum = weighted_sum_add(sum, x, splat<F>(call.weights[k]));
    }
    if (kBase) {
      return task_arithmetic_finish(base, sum, call.divide, splat<F>(call.divisor),
                                    splat<F>(call.scale));
    }
    return weighted_sum_finish(sum, call.divide, splat<F>(call.divisor));
  }

  // [begin, end); returns the largest key of the results.
  template <class Io, int K, bool kBase, bool kFinite>
  PM_INLINE I steps(const WeightedSumKernel& call, const char* const* in, char* out, int64_t begin,
                    int64_t end, Store store) {
    I seen{};
    for (int64_t i = begin; i < end; i += kStep) {
      prefetch_ahead<Io, K == 0 ? 0 : K + (kBase ? 1 : 0)>(in, i * Io::kBytes);
      const F a = point<Io, K, kBase, 0>(call, in, i * Io::kBytes);
      const F b = point<Io, K, kBase, 1>(call, in, i * Io::kBytes);
      const I key_a = magnitude_key(a), key_b = magnitude_key(b);
      seen = key_a > seen ? key_a : seen;
      seen = key_b > seen ? key_b : seen;
      store_step<Io, kFinite>(out, i, a, b, store);
    }
    return seen;
  }

  template <class Io, int K, bool kBase>
  void loop(const char* const* streams, char* out, int64_t n, Store store) {
    const WeightedSumKernel call = *this;
    const char* in[K > 0 ? K + 1 : 1];
    if (K > 0) {
      for (int i = 0; i < K + (kBase ? 1 : 0); ++i) in[i] = streams[i];
    }
    const char* const* at = K > 0 ? in : streams;
    I seen = call.worst;
    for (int64_t i = 0; i < n; i += kCheckSteps * kStep) {
      const int64_t end = n - i < kCheckSteps * kStep ? n : i + kCheckSteps * kStep;
      const I keys = steps<Io, K, kBase, true>(call, at, out, i, end, store);
      if (has_nonfinite(keys)) careful_steps<Io, kBase>(call, streams, out, i, end, store);
      seen = keys > seen ? keys : seen;
    }
    worst = seen;
  }

  template <class Io, bool kBase>
  __attribute__((noinline)) void careful_steps(const WeightedSumKernel& call, const char* const* in,
                                               char* out, int64_t begin, int64_t end, Store store) {
    steps<Io, 0, kBase, false>(call, in, out, begin, end, store);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    with_model_count(num_models, [&](auto models) {
      constexpr int K = decltype(models)::value;
      has_base ? loop<Io, K, true>(in, out, n, store) : loop<Io, K, false>(in, out, n, store);
    });
  }
};

// fp64 throughout, scalar code that the compiler vectorises; no unrolling over models.
struct WeightedSum64 {
  const double* weights;
  int num_models;
  bool has_base, divide;
  double divisor, scale;
  bool finite;

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    const auto* base = reinterpret_cast<const double*>(in[0]);
    auto* to = reinterpret_cast<double*>(out);
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int k = 0; k < num_models; ++k) {
        double x = reinterpret_cast<const double*>(in[k + has_base])[i];
        if (has_base) x = x - base[i];
        sum = sum + weights[k] * x;
      }
      if (divide) sum = sum / divisor;
      to[i] = has_base ? base[i] + scale * sum : sum;
      finite = finite && to[i] - to[i] == 0;
    }
  }
};

struct WeightedSumContext {
  const WeightedSumArgs* args;
  const float* weights;
  int32_t failed;
  int32_t nonfinite;
};

Streams streams_of(const WeightedSumArgs& args) {
  return Streams{args.base.data != nullptr ? &args.base : nullptr, args.models, args.num_models,
                 args.out, args.compute};
}

void weighted_sum_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<WeightedSumContext*>(opaque);
  const WeightedSumArgs& args = *context.args;
  const Streams streams = streams_of(args);
  const bool has_base = streams.base != nullptr;
  const bool wide = args.compute == Dtype::kF64;
  Room room;
  if (!room.take(streams.count(), wide ? 8 : 4, 0)) return set_flag(&context.failed);
  if (wide) {
    WeightedSum64 kernel{args.weights, args.num_models, has_base, args.divisor != 1.0,
                         args.divisor, args.scale,      true};
    run_mixed<Mixed64>(kernel, streams, room, begin, end);
    if (!kernel.finite) set_flag(&context.nonfinite);
  } else {
    WeightedSumKernel kernel{context.weights,
                             args.num_models,
                             has_base,
                             args.divisor != 1.0,
                             static_cast<float>(args.divisor),
                             static_cast<float>(args.scale),
                             I{}};
    run_range(kernel, streams, room, begin, end);
    if (has_nonfinite(kernel.worst)) set_flag(&context.nonfinite);
  }
}

Status weighted_sum(const WeightedSumArgs* args) {
  if (args->num_models < 1 || args->numel < 0) return Status::kBadArgument;
  const int k = args->num_models;
  float few[64];
  float* weights = k <= 64 ? few : static_cast<float*>(__builtin_malloc(sizeof(float) * k));
  if (weights == nullptr) return Status::kOutOfMemory;
  for (int i = 0; i < k; ++i) weights[i] = static_cast<float>(args->weights[i]);
  WeightedSumContext context{args, weights, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, weighted_sum_range, &context);
  if (weights != few) __builtin_free(weights);
  if (context.nonfinite) *args->nonfinite += 1;
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

struct FloorKernel {
  int num_streams;

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    const int64_t bytes = n * Io::kBytes;
    with_model_count(num_streams, [&](auto models) {
      constexpr int K = decltype(models)::value;
      const int count = K > 0 ? K : num_streams;
      const char* from[K > 0 ? K : 1];
      for (int k = 0; k < K; ++k) from[k] = in[k];
      const char* const* at = K > 0 ? from : in;
      for (int64_t i = 0; i < bytes; i += PM_VECTOR_BYTES) {
        U any{};
#pragma GCC unroll 16
        for (int k = 0; k < count; ++k) any |= load_bits(at[k] + i);
        store == Store::kStream ? stream_bits(out + i, any) : store_bits(out + i, any);
      }
    });
  }
};

void streaming_floor_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<WeightedSumContext*>(opaque);
  const Streams streams = streams_of(*context.args);
  Room room;
  if (!room.take(streams.count(), 4, 0)) return set_flag(&context.failed);
  FloorKernel kernel{streams.count()};
  run_range(kernel, streams, room, begin, end);
}

Status streaming_floor(const WeightedSumArgs* args) {
  Dtype dtype;
  if (args->num_models < 1 || !streams_of(*args).uniform(&dtype)) return Status::kBadArgument;
  WeightedSumContext context{args, nullptr, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, streaming_floor_range,
                  &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
