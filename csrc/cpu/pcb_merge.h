// PCB-Merging: the merge, given thresholds.
#pragma once

#include "cpu/compact.h"
#include "cpu/pcb_filter.h"
#include "cpu/pcb_scores.h"
#include "cpu/pcb_single.h"

namespace pymerge {
namespace {

// The merge, block by block: task vectors of the elements that may have a share, one after the
// other; what the merge adds to these, of those that several models may have a share of in a second
// step, packed once more; the output. Where most elements have a share, all are worked on.
struct PcbMergeKernel {
  static constexpr int kBlockSize = 1024;
  static constexpr int kStride = kBlockSize + kLanes;  // a vector may be written at the end
  static constexpr int kDenseBlocks = 15;              // until it is looked again

  // Elements one after the other.
  struct Packed {
    float* taus;    // [num_models][kStride]
    float* change;  // [kStride]

    float* tau(int k) const { return taus + static_cast<int64_t>(k) * kStride; }
    // A vector of zeros at the end, so that what is read there is not NaN.
    void end_at(int64_t count, int models) const {
      for (int k = 0; k < models; ++k) store_bits(tau(k) + count, U{});
    }
  };

  PcbCall call;
  const float* reals;
  PcbFilter filter;
  PcbTables tables;
  Packed all, several;
  int32_t* passing;  // [kStride], of `all`: which models may have a share
  F* room;           // [2 * num_models]
  uint32_t chosen[kBlockSize / kLanes];
  int dense = 0;       // blocks to come that are not filtered
  bool large = false;  // whether there are large magnitudes in a block
  I worst{};

  static int64_t bytes(int64_t models) {
    return (2 * models + 3) * kStride * 4 + 2 * models * PM_VECTOR_BYTES;
  }

  void take(char* memory) {
    const auto floats = [&](int64_t arrays) {
      auto* taken = reinterpret_cast<float*>(memory);
      memory += arrays * kStride * 4;
      return taken;
    };
    all = {floats(call.num_models), floats(1)};
    several = {floats(call.num_models), floats(1)};
    passing = reinterpret_cast<int32_t*>(floats(1));
    room = reinterpret_cast<F*>(memory);
    tables.take(call);
  }

  template <int K>
  static constexpr bool kSingles = kLookUps && K > 0 && K <= kSingleModels;

  template <class Io, int Half, PcbVariant kVariant, int K>
  PM_INLINE void choose(const PcbFilter& filter, const PcbCall& known, const char* const* in,
                        int64_t bytes, uint32_t& chosen, const Packed& to, int32_t* passing,
                        int64_t& count, U& largest) {
    const F base = Io::template load<Half>(in[0] + bytes);
    F tau[K > 0 ? K : kFilteredModels];
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) {
      tau[k] = Io::template load<Half>(in[k + 1] + bytes) - base;
    }
    I models;
    // In registers: what is stored may, to the compiler, change everything in memory.
    const uint32_t mask = lane_bits(pcb_survivors<kVariant, K>(filter, known, tau, largest, models));
    chosen = mask;
    PM_UNROLL
    for (int k = 0; k < known.num_models; ++k) pack(to.tau(k) + count, tau[k], mask);
    if constexpr (kSingles<K>) pack(reinterpret_cast<float*>(passing + count), (F)models, mask);
    count += __builtin_popcount(mask);
  }

  // Returns how many elements may have a share.
  template <class Io, PcbVariant kVariant, int K>
  __attribute__((noinline)) int choose_all(const char* const* in, int64_t at, int n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const PcbFilter limits = filter;
    const Packed to = all;
    int32_t* const models = passing;
    U largest{};
    int64_t count = 0;
    for (int i = 0; i < n; i += kStep) {
      const int64_t bytes = (at + i) * Io::kBytes;
      uint32_t* masks = chosen + i / kLanes;
      choose<Io, 0, kVariant, K>(limits, known, in, bytes, masks[0], to, models, count, largest);
      choose<Io, 1, kVariant, K>(limits, known, in, bytes, masks[1], to, models, count, largest);
    }
    const U limit = (U)splat<F>(limits.large) - 1;
    large = lane_bits(Traits<F>::at_most(largest, limit)) != lane_bits(Traits<F>::everything());
    return static_cast<int>(count);
  }

  template <class Io>
  void load_all(const char* const* in, int64_t at, int n) {
    for (int k = 0; k < call.num_models; ++k) {
      float* to = all.tau(k);
      for (int i = 0; i < n; i += kStep) {
        const char* base = in[0] + (at + i) * Io::kBytes;
        const char* model = in[k + 1] + (at + i) * Io::kBytes;
        store_bits(to + i, (U)(Io::template load<0>(model) - Io::template load<0>(base)));
        store_bits(to + i + kLanes, (U)(Io::template load<1>(model) - Io::template load<1>(base)));
      }
    }
  }

  template <PcbVariant kVariant, int K, bool kClamped = kVariant == PcbVariant::kPaper>
  __attribute__((noinline)) void change_all(const Packed& of, int64_t n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const Packed packed = of;
    packed.end_at(n, known.num_models);
    I seen = worst;
    for (int64_t i = 0; i < n; i += kLanes) {
      F own[K > 0 ? K : 1], scored[K > 0 ? K : 1];
      F* tau = K > 0 ? own : room;
      F* found = K > 0 ? scored : room + known.num_models;
      PM_UNROLL
      for (int k = 0; k < known.num_models; ++k) {
        tau[k] = (F)load_bits(packed.tau(k) + i);
        const I key = magnitude_key(tau[k]);
        seen = key > seen ? key : seen;
      }
      if constexpr (K > 0) {
        pcb_scores_in_step<kVariant, kClamped>(known, own, scored);
      } else {
        pcb_scores(known, tau, found);
      }
      store_bits(packed.change + i, (U)pcb_change<F>(known, tau, found));
    }
    worst = seen;
  }

  // The same where nothing is large.
  template <PcbVariant kVariant, int K>
  __attribute__((noinline)) void change_singles(int64_t n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const Packed from = all, more = several;
    uint32_t masks[kBlockSize / kLanes];
    int64_t count = 0;
    from.end_at(n, K);
    store_bits(passing + n, U{});
    for (int64_t i = 0; i < n; i += kLanes) {
      F tau[K];
      PM_UNROLL
      for (int k = 0; k < K; ++k) tau[k] = (F)load_bits(from.tau(k) + i);
      const I models = (I)load_bits(passing + i);
      const uint32_t mask = lane_bits(several_bits(models));
      masks[i / kLanes] = mask;
      PM_UNROLL
      for (int k = 0; k < K; ++k) pack(more.tau(k) + count, tau[k], mask);
      count += __builtin_popcount(mask);
      store_bits(from.change + i, (U)pcb_single_change<kVariant>(known, tables, tau, models));
    }
    if (count == 0) return;
    change_all<kVariant, K, false>(more, count);
    const float* changed = more.change;
    for (int64_t i = 0; i < n; i += kLanes) {
      const uint32_t mask = masks[i / kLanes];
      float* to = from.change + i;
      store_bits(to, (U)unpack(changed, mask, (F)load_bits(to)));
      changed += __builtin_popcount(mask);
    }
  }

  template <class Io, bool kStream>
  void store_all(const char* in, char* out, int n, bool filtered) {
    const F none = splat<F>(call.scale) * F{};
    const float* from = all.change;
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
        low = (F)load_bits(all.change + i);
        high = (F)load_bits(all.change + i + kLanes);
      }
      Io::template store<kStream, false>(out + i * Io::kBytes, Io::template load<0>(base) + low,
                                         Io::template load<1>(base) + high);
    }
  }

  template <PcbVariant kVariant, int K>
  void change(int count, bool filtered) {
    if (!filtered || large) return change_all<kVariant, K>(all, count);
    if constexpr (kSingles<K>) {
      change_singles<kVariant, K>(count);
    } else {
      change_all<kVariant, K, false>(all, count);
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
        if (large && kVariant != PcbVariant::kPaper) filtered = false;
      } else if (dense > 0) {
        --dense;
      }
      if (!filtered) {
        load_all<Io>(in, at, size);
        count = size;
      }
      change<kVariant, K>(count, filtered);
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
