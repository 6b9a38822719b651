// PCB-Merging (csrc/math/pcb.h): scores and the merge. The sums that the paper's softmax needs are
// in kernels_sums.h.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/pcb_filter.h"
#include "math/pcb.h"

namespace pymerge {
namespace {

// Kernels have a member template `loop`, compiled for each variant and 2 to 4 models, or any number
// of them: 0.
template <PcbVariant V>
struct PcbKind {
  static constexpr PcbVariant value = V;
};

template <int N>
struct PcbWidth {
  static constexpr int value = N;
};

template <class Kernel, PcbVariant kVariant, class... Arguments>
void pcb_with_count(Kernel& kernel, PcbKind<kVariant>, Arguments... arguments) {
  switch (kernel.call.num_models) {
    case 2:
      return kernel.template loop<kVariant, 2>(arguments...);
    case 3:
      return kernel.template loop<kVariant, 3>(arguments...);
    case 4:
      return kernel.template loop<kVariant, 4>(arguments...);
    default:
      return kernel.template loop<kVariant, 0>(arguments...);
  }
}

template <class Kernel, class... Arguments>
void pcb_with_variant(Kernel& kernel, Arguments... arguments) {
  switch (kernel.call.variant) {
    case PcbVariant::kPaper:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kPaper>{}, arguments...);
    case PcbVariant::kRoot:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kRoot>{}, arguments...);
    case PcbVariant::kVision:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kVision>{}, arguments...);
    case PcbVariant::kVisionEs:
      return pcb_with_count(kernel, PcbKind<PcbVariant::kVisionEs>{}, arguments...);
  }
}

// Calls function(width, first) for 0 to N, four at a time.
template <int N, int kFirst = 0, class Function>
PM_INLINE void in_steps(Function&& function) {
  constexpr int kWidth = N - kFirst < 4 ? N - kFirst : 4;
  function(PcbWidth<kWidth>{}, kFirst);
  if constexpr (kFirst + kWidth < N) in_steps<N, kFirst + kWidth>(function);
}

// The call with what is known when compiling, its numbers where nothing else is written.
template <PcbVariant kVariant, int K>
struct PcbKnown {
  float numbers[K > 0 ? pcb_reals(kVariant, K > 0 ? K : 1) : 1];

  __attribute__((always_inline)) PcbCall take(const PcbCall& call, const float* reals) {
    if constexpr (K > 0) {
      std::memcpy(numbers, reals, sizeof(numbers));
      return pcb_call(kVariant, K, numbers);
    }
    PcbCall known = call;
    known.variant = kVariant;
    return known;
  }
};

// The scores of K models, several exp or tanh in step. The same as pcb_scores.
template <PcbVariant kVariant, int K>
PM_INLINE void pcb_scores_in_step(const PcbCall& call, const F (&tau)[K], F (&scores)[K]) {
  constexpr int kPairs = K * (K + 1) / 2;
  const F many = splat<F>(static_cast<float>(K));
  F own[K];
  if constexpr (kVariant == PcbVariant::kPaper) {
    F terms[kPairs];
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      PM_UNROLL
      for (int j = i; j < K; ++j) {
        terms[pcb_pair(i, j, K)] = pcb_product(call, tau[i], tau[j], i, j);
      }
      own[i] = many * terms[pcb_pair(i, i, K)];
    }
    exp32_of<K>(own);
    in_steps<kPairs>([&](auto width, int first) { exp32_of<width.value>(terms + first); });
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      PM_UNROLL
      for (int j = i; j < K; ++j) {
        const int pair = pcb_pair(i, j, K);
        terms[pair] = terms[pair] * splat<F>(call.pair_norm[pair]);
      }
    }
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      F inter{};
      PM_UNROLL
      for (int j = 0; j < K; ++j) inter = inter + terms[pcb_pair(i, j, K)];
      scores[i] = (own[i] * splat<F>(call.norm[i])) * inter;
    }
  } else {
    F normal[K], inter[K];
    PM_UNROLL
    for (int i = 0; i < K; ++i) {
      normal[i] = pcb_normal(call, tau[i], i);
      own[i] = many * (normal[i] * normal[i]);
    }
    exp32_of<K>(own);
    if constexpr (kVariant == PcbVariant::kVisionEs) {
      F terms[kPairs];
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        PM_UNROLL
        for (int j = i; j < K; ++j) terms[pcb_pair(i, j, K)] = normal[i] * normal[j];
      }
      in_steps<kPairs>([&](auto width, int first) { tanh32_of<width.value>(terms + first); });
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        inter[i] = F{};
        PM_UNROLL
        for (int j = 0; j < K; ++j) inter[i] = inter[i] + terms[pcb_pair(i, j, K)];
      }
    } else {
      F total{};
      PM_UNROLL
      for (int i = 0; i < K; ++i) {
        total = total + (kVariant == PcbVariant::kRoot ? tau[i] : normal[i]);
      }
      PM_UNROLL
      for (int i = 0; i < K; ++i) inter[i] = tau[i] * total;
      tanh32_of<K>(inter);
    }
    PM_UNROLL
    for (int i = 0; i < K; ++i) scores[i] = own[i] * inter[i];
  }
}

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
        pcb_scores_in_step<kVariant, K>(known, own, scored);
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

// The merge, block by block: task vectors of the elements that may have a share, one after the
// other; what the merge adds to these; the output. Where most elements have a share, all are
// worked on.
struct PcbMergeKernel {
  static constexpr int kBlockSize = 1024;
  static constexpr int kStride = kBlockSize + kLanes;  // a vector may be written at the end
  static constexpr int kDenseBlocks = 15;              // until it is looked again

  PcbCall call;
  const float* reals;
  PcbFilter filter;
  float* taus;    // [num_models][kStride]
  float* change;  // [kStride]
  F* room;        // [2 * num_models]
  uint32_t chosen[kBlockSize / kLanes];
  int dense = 0;  // blocks to come that are not filtered
  I worst{};

  static int64_t bytes(int64_t models) {
    return (models + 1) * kStride * 4 + 2 * models * PM_VECTOR_BYTES;
  }

  void take(char* memory) {
    taus = reinterpret_cast<float*>(memory);
    change = taus + static_cast<int64_t>(call.num_models) * kStride;
    room = reinterpret_cast<F*>(change + kStride);
  }

  template <class Io, int Half, PcbVariant kVariant, int K>
  __attribute__((always_inline)) void choose(const PcbFilter& filter, const PcbCall& known,
                                             const char* const* in, int64_t bytes, int vector,
                                             int& count) {
    const F base = Io::template load<Half>(in[0] + bytes);
    F tau[K > 0 ? K : kFilteredModels];
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      tau[k] = Io::template load<Half>(in[k + 1] + bytes) - base;
    }
    const auto mask = pcb_survivors<kVariant, K>(filter, known, tau);
    chosen[vector] = lane_bits(mask);
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      compress(reinterpret_cast<int32_t*>(taus + k * kStride + count), (I)tau[k], mask);
    }
    count += __builtin_popcount(chosen[vector]);
  }

  // Returns how many elements may have a share.
  template <class Io, PcbVariant kVariant, int K>
  __attribute__((noinline)) int choose_all(const char* const* in, int64_t at, int n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const PcbFilter limits = filter;
    int count = 0;
    for (int i = 0; i < n; i += kStep) {
      const int64_t bytes = (at + i) * Io::kBytes;
      choose<Io, 0, kVariant, K>(limits, known, in, bytes, i / kLanes, count);
      choose<Io, 1, kVariant, K>(limits, known, in, bytes, i / kLanes + 1, count);
    }
    return count;
  }

  template <class Io>
  void load_all(const char* const* in, int64_t at, int n) {
    for (int k = 0; k < call.num_models; ++k) {
      float* to = taus + static_cast<int64_t>(k) * kStride;
      for (int i = 0; i < n; i += kStep) {
        const char* base = in[0] + (at + i) * Io::kBytes;
        const char* model = in[k + 1] + (at + i) * Io::kBytes;
        store_bits(to + i, (U)(Io::template load<0>(model) - Io::template load<0>(base)));
        store_bits(to + i + kLanes, (U)(Io::template load<1>(model) - Io::template load<1>(base)));
      }
    }
  }

  template <PcbVariant kVariant, int K>
  __attribute__((noinline)) void change_all(int n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    I seen = worst;
    for (int i = 0; i < n; i += kLanes) {
      F own[K > 0 ? K : 1], scored[K > 0 ? K : 1];
      F* tau = K > 0 ? own : room;
      F* found = K > 0 ? scored : room + known.num_models;
      PM_UNROLL
      for (int k = 0; k < known.num_models; ++k) {
        tau[k] = (F)load_bits(taus + k * kStride + i);
        const I key = magnitude_key(tau[k]);
        seen = key > seen ? key : seen;
      }
      if constexpr (K > 0) {
        pcb_scores_in_step<kVariant, K>(known, own, scored);
      } else {
        pcb_scores(known, tau, found);
      }
      store_bits(change + i, (U)pcb_change<F>(known, tau, found));
    }
    worst = seen;
  }

  template <class Io, bool kStream>
  void store_all(const char* in, char* out, int n, bool filtered) {
    const F none = splat<F>(call.scale) * F{};
    const float* from = change;
    for (int i = 0; i < n; i += kStep) {
      const char* base = in + i * Io::kBytes;
      F low, high;
      if (filtered) {
        const uint32_t* mask = chosen + i / kLanes;
        low = expand(from, mask[0], none);
        from += __builtin_popcount(mask[0]);
        high = expand(from, mask[1], none);
        from += __builtin_popcount(mask[1]);
      } else {
        low = (F)load_bits(change + i);
        high = (F)load_bits(change + i + kLanes);
      }
      Io::template store<kStream, false>(out + i * Io::kBytes, Io::template load<0>(base) + low,
                                         Io::template load<1>(base) + high);
    }
  }

  template <PcbVariant kVariant, int K, class Io>
  void loop_of(const char* const* in, char* out, int64_t n, Store store) {
    for (int64_t at = 0; at < n; at += kBlockSize) {
      const int size = static_cast<int>(n - at < kBlockSize ? n - at : kBlockSize);
      bool filtered = filter.usable && dense == 0;
      int count = size;
      if (filtered) {
        count = choose_all<Io, kVariant, K>(in, at, size);
        filtered = count <= size * 5 / 8;
        if (!filtered) dense = kDenseBlocks;
      } else if (dense > 0) {
        --dense;
      }
      if (!filtered) {
        load_all<Io>(in, at, size);
        count = size;
      }
      for (int k = 0; k < call.num_models; ++k) {
        store_bits(taus + static_cast<int64_t>(k) * kStride + count, U{});
      }
      change_all<kVariant, K>(count);
      const char* base = in[0] + at * Io::kBytes;
      char* to = out + at * Io::kBytes;
      if (store == Store::kStream) {
        store_all<Io, true>(base, to, size, filtered);
      } else {
        store_all<Io, false>(base, to, size, filtered);
      }
    }
  }

  template <PcbVariant kVariant, int K, class Io>
  void loop(Io, const char* const* in, char* out, int64_t n, Store store) {
    loop_of<kVariant, K, Io>(in, out, n, store);
  }

  template <class Io>
  void run(const char* const* in, char* out, int64_t n, Store store) {
    pcb_with_variant(*this, Io{}, in, out, n, store);
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
    kernel.filter = pcb_filter(call);
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
