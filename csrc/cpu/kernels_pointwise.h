// Methods that treat each element independently (csrc/math/pointwise.h).
#pragma once

#include "cpu/kernels_weighted_sum.h"
#include "math/pointwise.h"

namespace pymerge {
namespace {

#define PM_ALWAYS __attribute__((always_inline))

// Calls `function` with the element formula of the op. Each kind is a type of its own, so the loop
// is compiled separately for each.
template <class Function>
PM_INLINE void with_point(Pointwise op, Function&& function) {
  switch (op) {
#define PM_POINTWISE(kind, name, reals, models)                \
  case Pointwise::kind:                                        \
    return function([](auto base, auto load, const auto& call) \
                        PM_ALWAYS { return name##_point(base, load, call); });
#include "pointwise.def"
  }
}

// The largest number of reals that any kind takes for K models.
constexpr int64_t most_pointwise_reals(int64_t K) {
  int64_t most = 1;
#define PM_POINTWISE(kind, name, reals, models) most = most < (reals) ? (reals) : most;
#include "pointwise.def"
  return most;
}

// SCE for finite numbers where the mask is set everywhere: sce_point at two thirds of its
// operations. The variance is only compared with the threshold T, so sum d_k^2 - (sum d_k)^2 / K -
// K T is enough. The rounding errors of this number and of the variance in sce_point add up to at
// most 40 units in the last place of sum d_k^2. `unsure` becomes nonzero where the number is closer
// to 0 than that, or where a delta is not finite; sce_point then computes these elements.
template <int K>
struct SceEverywhere {
  F weights[K];
  F threshold, slack, share;  // K T, 64 units of it, -1 / K

  static bool possible(Pointwise op, const float* reals) {
#if !defined(__FMA__)
    return false;  // a square that is rounded separately may overflow where the distance does not
#endif
    const float least = reals[1];
    bool finite = true;
    for (int k = 0; k < K; ++k) finite = finite && __builtin_isfinite(reals[2 + k]);
    return op == Pointwise::kSce && reals[0] != 0 && least >= 1e-30f && least <= 1e30f && finite;
  }

  explicit SceEverywhere(const float* reals) {
    for (int k = 0; k < K; ++k) weights[k] = splat<F>(reals[2 + k]);
    threshold = splat<F>(static_cast<float>(K) * reals[1]);
    slack = threshold * splat<F>(kUnits);
    share = splat<F>(-1.0f / static_cast<float>(K));
  }

  static constexpr float kUnits = 0x1p-18f;

  PM_ALWAYS F point(F base, const F (&x)[K], FloatMasks::Mask& unsure) const {
    using T = Traits<F>;
    F deltas[K];
    F sum{}, apart = -threshold;
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      deltas[k] = x[k] - base;
      sum = k == 0 ? deltas[k] : sum + deltas[k];
      apart = T::about(deltas[k], deltas[k], apart);
    }
    const I sign = (I)sum & T::kSignMask;
    F merged{}, total{};
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const auto agrees = T::positive((F)((I)deltas[k] ^ sign), T::everything());
      merged = T::add(merged, weights[k] * deltas[k], agrees);
      total = k == 0 ? T::keep(weights[k], agrees) : T::add(total, weights[k], agrees);
    }
    merged = merged / T::larger(splat<F>(1e-6f), total);
    const F near = T::about(apart, splat<F>(kUnits), slack);
    const F distance = T::about(sum * share, sum, apart);
    unsure = T::either(unsure, T::not_less(near, (F)magnitude_key(distance)));
    return base + T::keep(merged, T::not_less(distance, F{}));
  }
};

struct PointwiseKernel {
  Pointwise op;
  const float* reals;
  int num_models;
  I worst;  // the largest key of all inputs, kept where the finite steps do not show that all are
            // finite

  // Any numbers, any number of models; [begin, end).
  template <class Io, class Point>
  __attribute__((noinline)) void careful_steps(Point compute, const char* const* in, char* out,
                                               int64_t begin, int64_t end, Store store) {
    const PointwiseCall<F> call{reals, num_models};
    I seen = worst;
    const auto point = [&](auto half, int64_t bytes) PM_ALWAYS {
      const auto load = [&](int k) PM_ALWAYS {
        return Io::template load<decltype(half)::value>(in[k + 1] + bytes);
      };
      for (int k = -1; k < call.num_models; ++k) {
        const I key = magnitude_key(load(k));
        seen = key > seen ? key : seen;
      }
      return compute(load(-1), load, call);
    };
    for (int64_t i = begin; i < end; i += kStep) {
      const F a = point(ModelCount<0>{}, i * Io::kBytes);
      const F b = point(ModelCount<1>{}, i * Io::kBytes);
      store_step<Io, false>(out, i, a, b, store);
    }
    worst = seen;
  }

  // The result and the sum of all task vectors go into `seen`, which becomes non-finite if an input
  // is not finite or the result may be NaN. The sum costs nothing where the method computes the
  // same one.
  template <class Io, int K, int Half, class Point>
  PM_INLINE F finite_point(Point compute, const PointwiseCall<F>& call, const char* const* in,
                           int64_t bytes, F& seen) {
    const F base = Io::template load<Half>(in[0] + bytes);
    F values[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) values[k] = Io::template load<Half>(in[k + 1] + bytes);
    const auto load = [&](int k) PM_ALWAYS { return values[k]; };
    const F result = compute(base, load, call);
    seen = seen + (sum_of_deltas(base, load, call) + result);
    return result;
  }

  template <class Io, int K, class Point>
  void loop(Point compute, const char* const* streams, char* out, int64_t n, Store store) {
    float numbers[most_pointwise_reals(K)];
    const int64_t many = pointwise_reals(op, K);
    for (int64_t i = 0; i < many; ++i) numbers[i] = reals[i];
    const PointwiseCall<F> call{numbers, K};
    const char* in[K + 1];
    for (int k = 0; k <= K; ++k) in[k] = streams[k];
    for (int64_t first = 0; first < n; first += kCheckSteps * kStep) {
      const int64_t end = n - first < kCheckSteps * kStep ? n : first + kCheckSteps * kStep;
      F seen_a{}, seen_b{};
      for (int64_t i = first; i < end; i += kStep) {
        const int64_t bytes = i * Io::kBytes;
        prefetch_ahead<Io, K + 1>(in, bytes);
        const F a = finite_point<Io, K, 0>(compute, call, in, bytes, seen_a);
        const F b = finite_point<Io, K, 1>(compute, call, in, bytes, seen_b);
        store_step<Io, true>(out, i, a, b, store);
      }
      if (has_nonfinite(magnitude_key(seen_a + seen_b))) {
        careful_steps<Io>(compute, streams, out, first, end, store);
      }
    }
  }

  template <class Io, int K>
  void sce_everywhere(const char* const* streams, char* out, int64_t n, Store store) {
    const SceEverywhere<K> numbers(reals);
    const char* in[K + 1];
    for (int k = 0; k <= K; ++k) in[k] = streams[k];
    const auto point = [&](auto half, int64_t bytes, auto& unsure) PM_ALWAYS {
      F x[K];
      constexpr int kHalf = decltype(half)::value;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) x[k] = Io::template load<kHalf>(in[k + 1] + bytes);
      return numbers.point(Io::template load<kHalf>(in[0] + bytes), x, unsure);
    };
    for (int64_t first = 0; first < n; first += kCheckSteps * kStep) {
      const int64_t end = n - first < kCheckSteps * kStep ? n : first + kCheckSteps * kStep;
      FloatMasks::Mask unsure{};
      for (int64_t i = first; i < end; i += kStep) {
        const int64_t bytes = i * Io::kBytes;
        prefetch_ahead<Io, K + 1>(in, bytes);
        const F a = point(ModelCount<0>{}, bytes, unsure);
        const F b = point(ModelCount<1>{}, bytes, unsure);
        store_step<Io, true>(out, i, a, b, store);
      }
      if (FloatMasks::any(unsure)) {
        const auto exact = [](auto base, auto load, const auto& call)
                               PM_ALWAYS { return sce_point(base, load, call); };
        careful_steps<Io>(exact, streams, out, first, end, store);
      }
    }
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    if (num_models == 4 && SceEverywhere<4>::possible(op, reals)) {
      return sce_everywhere<Io, 4>(in, out, n, store);
    }
    with_point(op, [&](auto compute) {
      switch (num_models) {
        case 1:
          return loop<Io, 1>(compute, in, out, n, store);
        case 2:
          return loop<Io, 2>(compute, in, out, n, store);
        case 3:
          return loop<Io, 3>(compute, in, out, n, store);
        case 4:
          return loop<Io, 4>(compute, in, out, n, store);
        default:
          return careful_steps<Io>(compute, in, out, 0, n, store);
      }
    });
  }
};

struct Pointwise64 {
  Pointwise op;
  const double* reals;
  int num_models;
  L worst;

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    const PointwiseCall<D> call{reals, num_models};
    with_point(op, [&](auto compute) {
      for (int64_t i = 0; i < n; i += kDLanes) {
        const auto load = [&](int k) { return (D)load_bits(in[k + 1] + 8 * i); };
        const D base = (D)load_bits(in[0] + 8 * i);
        for (int k = -1; k < num_models; ++k) {
          const L key = magnitude_key(load(k));
          worst = key > worst ? key : worst;
        }
        store_bits(out + 8 * i, (U)compute(base, load, call));
      }
    });
  }
};

struct PointwiseContext {
  const PointwiseArgs* args;
  const float* reals;
  int32_t failed, nonfinite;
};

void pointwise_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<PointwiseContext*>(opaque);
  const PointwiseArgs& args = *context.args;
  const Streams streams{&args.base, args.models, args.num_models, args.out, args.compute};
  const bool wide = args.compute == Dtype::kF64;
  Room room;
  if (!room.take(streams.count(), wide ? 8 : 4, 0)) return set_flag(&context.failed);
  bool nonfinite = false;
  if (wide) {
    Pointwise64 kernel{args.op, args.reals, args.num_models, L{}};
    run_mixed<Mixed64>(kernel, streams, room, begin, end);
    for (int i = 0; i < kDLanes; ++i) nonfinite |= kernel.worst[i] >= Traits<D>::kInfinity;
  } else {
    PointwiseKernel kernel{args.op, context.reals, args.num_models, I{}};
    run_range(kernel, streams, room, begin, end);
    nonfinite = has_nonfinite(kernel.worst);
  }
  if (nonfinite) set_flag(&context.nonfinite);
}

Status pointwise(const PointwiseArgs* args) {
  if (!known(args->op)) return Status::kUnknownKind;
  if (args->num_models < 1 || args->numel < 0 || args->base.data == nullptr ||
      args->num_reals != pointwise_reals(args->op, args->num_models)) {
    return Status::kBadArgument;
  }
  const auto bytes = sizeof(float) * static_cast<size_t>(args->num_reals + 1);
  auto* reals = static_cast<float*>(__builtin_malloc(bytes));
  if (reals == nullptr) return Status::kOutOfMemory;
  for (int i = 0; i < args->num_reals; ++i) reals[i] = static_cast<float>(args->reals[i]);
  PointwiseContext context{args, reals, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, pointwise_range, &context);
  __builtin_free(reals);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
