// PCB-Merging (csrc/math/pcb.h): scores and the merge. The sums that the paper's softmax needs are
// in kernels_sums.h.
#pragma once

#include "cpu/pcb_merge.h"

namespace pymerge {
namespace {

// Scores of converted blocks: F32 lanes in order.
struct PcbScoresKernel {
  PcbCall call;
  const float* reals;
  float* scores;  // [num_models][stride]
  int64_t stride;
  F* room;  // [2 * num_models]
  I worst;
  int64_t at;

  template <PcbVariant kVariant, int K>
  void loop(const char* const* in, int64_t n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    I seen = worst;
    for (int64_t i = 0; i < n; i += kLanes) {
      F own[K > 0 ? K : 1], scored[K > 0 ? K : 1];
      F* tau = K > 0 ? own : room;
      F* found = K > 0 ? scored : room + known.num_models;
      const F base = (F)load_bits(in[0] + 4 * i);
      PM_UNROLL
      for (int k = 0; k < known.num_models; ++k) {
        tau[k] = (F)load_bits(in[k + 1] + 4 * i) - base;
        const I key = magnitude_key(tau[k]);
        seen = key > seen ? key : seen;
      }
      if constexpr (K > 0) {
        pcb_scores_in_step<kVariant, kVariant == PcbVariant::kPaper>(known, own, scored);
      } else {
        pcb_scores(known, tau, found);
      }
      PM_UNROLL
      for (int k = 0; k < known.num_models; ++k) {
        store_bits(scores + k * stride + at + i, (U)pcb_positive(known, found[k]));
      }
    }
    worst = seen;
  }

  template <class Io>
  void run(const char* const* in, char*, int64_t n, Store) {
    pcb_with_variant(*this, in, n);
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
  const bool merge = args.scores == nullptr;
  const int64_t extra = merge ? PcbMergeKernel::bytes(args.num_models)
                              : 2 * static_cast<int64_t>(args.num_models) * PM_VECTOR_BYTES;
  Room room;
  if (!room.take(streams.count(), 4, extra)) return set_flag(&context.failed);
  char* memory = room.data - (streams.count() * 8 + 63) / 64 * 64 + Room::bytes(streams.count(), 4);
  const auto variant = static_cast<PcbVariant>(args.variant);
  const PcbCall call = pcb_call(variant, args.num_models, args.reals);
  I worst;
  if (merge) {
    PcbMergeKernel kernel;
    kernel.call = call;
    kernel.reals = args.reals;
    kernel.take(memory);
    Dtype dtype;
    if (!streams.uniform(&dtype) || dtype == Dtype::kF16) {
      run_mixed<Mixed32>(kernel, streams, room, begin, end);
    } else if (dtype == Dtype::kBF16) {
      run_uniform<Bf16>(kernel, streams, room, begin, end);
    } else {
      run_uniform<F32>(kernel, streams, room, begin, end);
    }
    worst = kernel.worst;
  } else {
    PcbScoresKernel kernel{call, args.reals, args.scores, args.stride, reinterpret_cast<F*>(memory),
                           I{},  0};
    run_mixed<Mixed32>(kernel, streams, room, begin, end);
    worst = kernel.worst;
  }
  if (has_nonfinite(worst)) set_flag(&context.nonfinite);
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
