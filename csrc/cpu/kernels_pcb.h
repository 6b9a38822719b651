// PCB-Merging (csrc/math/pcb.h): scores, the merge, and the sums that the paper's softmax needs.
#pragma once

#include "cpu/elementwise.h"
#include "math/pcb.h"

namespace pymerge {
namespace {

// Works on converted blocks: F32 lanes in order.
struct PcbKernel {
  PcbCall call;
  float* scores;  // [num_models][stride], or null: merge
  int64_t stride;
  F* room;  // [2 * num_models]
  I worst;
  int64_t at;

  // K models of a variant that is known here, or any number of either.
  template <int K, class Taus>
  void point(const PcbCall& known, const char* const* in, char* out, int64_t i, Taus& tau,
             Taus& found, I& seen) {
    const F base = (F)load_bits(in[0] + 4 * i);
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      tau[k] = (F)load_bits(in[k + 1] + 4 * i) - base;
      const I key = magnitude_key(tau[k]);
      seen = key > seen ? key : seen;
    }
    if constexpr (K > 0) {
      pcb_scores_of<4>(known, tau, found);
    } else {
      pcb_scores(known, tau, found);
    }
    if (scores == nullptr) {
      store_bits(out + 4 * i, (U)pcb_merge(known, base, tau, found));
      return;
    }
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      store_bits(scores + k * stride + at + i, (U)pcb_positive(known, found[k]));
    }
  }

  template <PcbVariant kVariant, int K>
  void loop(const char* const* in, char* out, int64_t n) {
    I seen = worst;
    if constexpr (K > 0) {
      PcbCall known = call;
      known.variant = kVariant;
      known.num_models = K;
      for (int64_t i = 0; i < n; i += kLanes) {
        F tau[K], found[K];
        point<K>(known, in, out, i, tau, found, seen);
      }
    } else {
      F* tau = room;
      F* found = room + call.num_models;
      for (int64_t i = 0; i < n; i += kLanes) point<K>(call, in, out, i, tau, found, seen);
    }
    worst = seen;
  }

  template <PcbVariant kVariant>
  void with_count(const char* const* in, char* out, int64_t n) {
    switch (call.num_models) {
      case 2:
        return loop<kVariant, 2>(in, out, n);
      case 3:
        return loop<kVariant, 3>(in, out, n);
      case 4:
        return loop<kVariant, 4>(in, out, n);
      default:
        return loop<PcbVariant::kPaper, 0>(in, out, n);  // of any variant
    }
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store) {
    switch (call.variant) {
      case PcbVariant::kPaper:
        return with_count<PcbVariant::kPaper>(in, out, n);
      case PcbVariant::kRoot:
        return with_count<PcbVariant::kRoot>(in, out, n);
      case PcbVariant::kVision:
        return with_count<PcbVariant::kVision>(in, out, n);
      case PcbVariant::kVisionEs:
        return with_count<PcbVariant::kVisionEs>(in, out, n);
    }
  }
};

struct PcbContext {
  const PcbArgs* args;
  int32_t failed, nonfinite;
};

void pcb_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<PcbContext*>(opaque);
  const PcbArgs& args = *context.args;
  const Streams streams{&args.base, args.models, args.num_models, args.out, Dtype::kF32};
  const int64_t extra = 2 * static_cast<int64_t>(args.num_models) * PM_VECTOR_BYTES;
  Room room;
  if (!room.take(streams.count(), 4, extra)) return set_flag(&context.failed);
  F* values = reinterpret_cast<F*>(room.data - (streams.count() * 8 + 63) / 64 * 64 +
                                   Room::bytes(streams.count(), 4));
  const auto variant = static_cast<PcbVariant>(args.variant);
  const PcbCall call = pcb_call(variant, args.num_models, args.reals);
  PcbKernel kernel{call, args.scores, args.stride, values, I{}, 0};
  run_mixed<Mixed32>(kernel, streams, room, begin, end);
  if (has_nonfinite(kernel.worst)) set_flag(&context.nonfinite);
}

Status pcb(const PcbArgs* args) {
  if (args->numel == 0) return Status::kOk;
  const int64_t padded = (args->numel + kScoreAlignment - 1) / kScoreAlignment * kScoreAlignment;
  if (args->num_models < 1 || args->numel < 0 || args->base.data == nullptr || args->variant < 0 ||
      args->variant > 3 ||
      args->num_reals != pcb_reals(static_cast<PcbVariant>(args->variant), args->num_models) ||
      (args->scores == nullptr) == (args->out.data == nullptr) ||
      (args->scores != nullptr && args->stride < padded)) {
    return Status::kBadArgument;
  }
  static_assert(kScoreAlignment % kStep == 0 && kGrain % kScoreAlignment == 0, "padding");
  PcbContext context{args, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, pcb_range, &context);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
