// PCB-Merging: the merge, given thresholds.
#pragma once

#include "cpu/compact.h"
#include "cpu/pcb_filter.h"
#include "cpu/pcb_scores.h"

namespace pymerge {
namespace {

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
  int dense = 0;       // blocks to come that are not filtered
  bool large = false;  // whether arguments of the paper's exp may have to be clamped in a block
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
                                             int& count, I& largest) {
    const F base = Io::template load<Half>(in[0] + bytes);
    F tau[K > 0 ? K : kFilteredModels];
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      tau[k] = Io::template load<Half>(in[k + 1] + bytes) - base;
    }
    const auto mask = pcb_survivors<kVariant, K>(filter, known, tau, largest);
    chosen[vector] = lane_bits(mask);
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      pack(taus + k * kStride + count, tau[k], chosen[vector]);
    }
    count += __builtin_popcount(chosen[vector]);
  }

  // Returns how many elements may have a share.
  template <class Io, PcbVariant kVariant, int K>
  __attribute__((noinline)) int choose_all(const char* const* in, int64_t at, int n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const PcbFilter limits = filter;
    I largest{};
    int count = 0;
    for (int i = 0; i < n; i += kStep) {
      const int64_t bytes = (at + i) * Io::kBytes;
      choose<Io, 0, kVariant, K>(limits, known, in, bytes, i / kLanes, count, largest);
      choose<Io, 1, kVariant, K>(limits, known, in, bytes, i / kLanes + 1, count, largest);
    }
    large = Traits<F>::any(Traits<F>::at_least(largest, I{} + bit_cast<int32_t>(limits.large)));
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

  template <PcbVariant kVariant, int K, bool kClamped = kVariant == PcbVariant::kPaper>
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
        pcb_scores_in_step<kVariant, kClamped>(known, own, scored);
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
        low = unpack(from, mask[0], none);
        from += __builtin_popcount(mask[0]);
        high = unpack(from, mask[1], none);
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
      if (kVariant == PcbVariant::kPaper && filtered && !large) {
        change_all<kVariant, K, false>(count);
      } else {
        change_all<kVariant, K>(count);
      }
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

}  // namespace
}  // namespace pymerge
