// ties: one pass of trim, election and disjoint merge, thresholds given.
#pragma once

#include "cpu/kernels_weighted_sum.h"
#include "math/ties.h"

namespace pymerge {
namespace {

struct TiesTotals {
  int64_t balance = 0;
  int64_t zero_kept = 0;
};

template <class V>
void flush(TiesSigns<V>& signs, TiesTotals& totals) {
  constexpr int lanes = sizeof(V) / sizeof(typename Traits<V>::Scalar);
  for (int i = 0; i < lanes; ++i) {
    totals.balance += signs.balance[i];
    totals.zero_kept += signs.zero_kept[i];
  }
  signs = TiesSigns<V>{};
}

struct TiesKernel {
  TiesCall<F> call;
  bool weighted;
  bool want_signs;
  bool any;  // a dialect that only ties_point_any supports
  F* values;
  I worst;
  TiesTotals totals;

  template <class Io, int K, bool kWeighted, bool kSigns, int Half>
  PM_INLINE F point(const TiesCall<F>& call, const char* const* in, int64_t at, F* values, I& worst,
                    TiesSigns<F>& signs) {
    const F base = Io::template load<Half>(in[0] + at);
    const auto load = [&](int k) { return Io::template load<Half>(in[k + 1] + at); };
    if constexpr (K > 0) {
      return ties_point<K, kWeighted, kSigns>(base, load, call, worst, signs);
    } else {
      return ties_point_any(base, load, call, values, worst, signs);
    }
  }

  // [begin, end), at most kCheckSteps steps. K = 0 is the version for everything.
  template <class Io, int K, bool kWeighted, bool kSigns>
  PM_INLINE I steps(const TiesCall<F>& call, const char* const* in, F* values, char* out,
                    int64_t begin, int64_t end, Store store, TiesTotals& totals) {
    I worst{};
    TiesSigns<F> signs{};
    for (int64_t i = begin; i < end; i += kStep) {
      const int64_t at = i * Io::kBytes;
      if (K > 0) prefetch_ahead<Io, K + 1>(in, at);
      const F a = point<Io, K, kWeighted, kSigns, 0>(call, in, at, values, worst, signs);
      const F b = point<Io, K, kWeighted, kSigns, 1>(call, in, at, values, worst, signs);
      store_step<Io, (K > 0)>(out, i, a, b, store);
    }
    if (K == 0 || !has_nonfinite(worst)) flush(signs, totals);
    return worst;
  }

  template <class Io>
  __attribute__((noinline)) I careful_steps(const TiesCall<F>& call, const char* const* in,
                                            F* values, char* out, int64_t begin, int64_t end,
                                            Store store, TiesTotals& totals) {
    return steps<Io, 0, true, true>(call, in, values, out, begin, end, store, totals);
  }

  template <class Io, int K, bool kWeighted, bool kSigns>
  void loop(const char* const* streams, char* out, int64_t n, Store store) {
    // Local copies of everything: the compiler must see that no store can change them.
    const TiesCall<F> mine = call;
    F* const room = values;
    TiesTotals found = totals;
    I seen = worst;
    int32_t thresholds[K > 0 ? K : 1];
    float weights[K > 0 ? K : 1];
    const char* in[K + 1];
    TiesCall<F> unrolled = mine;
    if (K > 0) {
      for (int k = 0; k < K; ++k) {
        thresholds[k] = mine.thresholds[k] > 0 ? mine.thresholds[k] : 1;
        weights[k] = kWeighted ? mine.weights[k] : 1.0f;
      }
      for (int k = 0; k <= K; ++k) in[k] = streams[k];
      unrolled.thresholds = thresholds;
      unrolled.weights = weights;
    }
    for (int64_t i = 0; i < n; i += kCheckSteps * kStep) {
      const int64_t end = n - i < kCheckSteps * kStep ? n : i + kCheckSteps * kStep;
      I keys{};
      if (K > 0) {
        keys = steps<Io, K, kWeighted, kSigns>(unrolled, in, room, out, i, end, store, found);
      }
      if (K == 0 || has_nonfinite(keys)) {
        keys = careful_steps<Io>(mine, streams, room, out, i, end, store, found);
      }
      seen = keys > seen ? keys : seen;
    }
    worst = seen;
    totals = found;
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    with_model_count(any ? 0 : call.num_models, [&](auto models) {
      constexpr int K = decltype(models)::value;
      if constexpr (K == 0) {
        loop<Io, 0, true, true>(in, out, n, store);
      } else if (weighted) {
        loop<Io, K, true, false>(in, out, n, store);
      } else if (want_signs) {
        loop<Io, K, false, true>(in, out, n, store);
      } else {
        loop<Io, K, false, false>(in, out, n, store);
      }
    });
  }
};

struct Ties64 {
  TiesCall<D> call;
  D* values;
  L worst;
  TiesTotals totals;

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    TiesSigns<D> signs{};
    for (int64_t i = 0; i < n; i += kDLanes) {
      const D base = (D)load_bits(in[0] + 8 * i);
      const auto load = [&](int k) { return (D)load_bits(in[k + 1] + 8 * i); };
      store_bits(out + 8 * i, (U)ties_point_any(base, load, call, values, worst, signs));
    }
    flush(signs, totals);
  }
};

struct TiesContext {
  const TiesArgs* args;
  const int32_t* thresholds;
  const float* weights;
  int64_t balance, zero_kept;
  int32_t failed, nonfinite;
};

template <class V>
TiesCall<V> ties_call(const TiesArgs& args, const typename Traits<V>::IntScalar* thresholds,
                      const typename Traits<V>::Scalar* weights) {
  using Scalar = typename Traits<V>::Scalar;
  TiesCall<V> call{};
  call.thresholds = thresholds;
  call.weights = weights;
  call.num_models = args.num_models;
  call.divide = args.merge == TiesMerge::kMeanOfCount || args.merge == TiesMerge::kMeanOfWeights;
  call.divide_by_weights = args.merge == TiesMerge::kMeanOfWeights;
  call.weigh_before = args.weighting == Weighting::kBefore;
  call.weigh_after = args.weighting == Weighting::kAfter;
  call.largest = args.merge == TiesMerge::kMax;
  call.elect_count = args.elect_count != 0;
  call.zero_step = args.zero_sign < 0 ? -1 : 0;
  call.zero_sign = splat<V>(static_cast<Scalar>(args.zero_sign));
  call.scale = splat<V>(static_cast<Scalar>(args.scale));
  return call;
}

void ties_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<TiesContext*>(opaque);
  const TiesArgs& args = *context.args;
  const Streams streams{&args.base, args.models, args.num_models, args.out, args.compute};
  const bool wide = args.compute == Dtype::kF64;
  const int64_t extra = static_cast<int64_t>(args.num_models) * PM_VECTOR_BYTES;
  Room room;
  if (!room.take(streams.count(), wide ? 8 : 4, extra)) return set_flag(&context.failed);
  char* values = room.more;
  TiesTotals totals;
  bool nonfinite = false;
  if (wide) {
    Ties64 kernel{ties_call<D>(args, args.thresholds, args.weights), reinterpret_cast<D*>(values),
                  L{}, TiesTotals{}};
    run_mixed<Mixed64>(kernel, streams, room, begin, end);
    totals = kernel.totals;
    for (int i = 0; i < kDLanes; ++i) nonfinite |= kernel.worst[i] >= Traits<D>::kInfinity;
  } else {
    TiesKernel kernel{ties_call<F>(args, context.thresholds, context.weights),
                      args.weighting != Weighting::kNone,
                      args.want_signs != 0,
                      false,
                      reinterpret_cast<F*>(values),
                      I{},
                      TiesTotals{}};
    const bool mean_as_usual =
        args.merge == (kernel.weighted ? TiesMerge::kMeanOfWeights : TiesMerge::kMeanOfCount);
    kernel.any = !(mean_as_usual || args.merge == TiesMerge::kSum) || args.zero_sign == 0 ||
                 args.elect_count != 0 || args.weighting == Weighting::kAfter ||
                 (kernel.weighted && kernel.want_signs) || args.scale == 0 ||
                 !__builtin_isfinite(static_cast<float>(args.scale));
    for (int k = 0; k < args.num_models; ++k) {
      kernel.any = kernel.any || context.thresholds[k] > Traits<F>::kInfinity;
    }
    run_range(kernel, streams, room, begin, end);
    totals = kernel.totals;
    nonfinite = has_nonfinite(kernel.worst);
  }
  __atomic_fetch_add(&context.balance, totals.balance, __ATOMIC_RELAXED);
  __atomic_fetch_add(&context.zero_kept, totals.zero_kept, __ATOMIC_RELAXED);
  if (nonfinite) set_flag(&context.nonfinite);
}

Status ties(const TiesArgs* args) {
  const int k = args->num_models;
  if (k < 1 || args->numel < 0 || args->base.data == nullptr) return Status::kBadArgument;
  if (args->weighting != Weighting::kNone && args->weights == nullptr) return Status::kBadArgument;
  struct {
    int32_t thresholds[64];
    float weights[64];
  } few;
  void* many = k <= 64 ? nullptr : __builtin_malloc(8 * static_cast<size_t>(k));
  if (k > 64 && many == nullptr) return Status::kOutOfMemory;
  int32_t* thresholds = many == nullptr ? few.thresholds : static_cast<int32_t*>(many);
  float* weights = many == nullptr ? few.weights : reinterpret_cast<float*>(thresholds + k);
  for (int i = 0; i < k; ++i) {
    const int64_t key = args->thresholds[i];
    thresholds[i] = static_cast<int32_t>(key > INT32_MAX ? INT32_MAX : key);
    weights[i] = args->weights == nullptr ? 1.0f : static_cast<float>(args->weights[i]);
  }
  TiesContext context{args, thresholds, weights, 0, 0, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, ties_range, &context);
  __builtin_free(many);
  if (context.failed) return Status::kOutOfMemory;
  if (args->want_signs != 0) {
    args->stats[0] += context.balance;
    args->stats[1] += context.zero_kept;
  }
  args->stats[2] += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
