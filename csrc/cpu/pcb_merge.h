// PCB-Merging: the merge, given thresholds.
#pragma once

#include "cpu/compact.h"
#include "cpu/elementwise.h"
#include "cpu/pcb_filter.h"
#include "cpu/pcb_scores.h"
#include "cpu/pcb_single.h"

namespace pymerge {
namespace {

// Packing, for bf16, of elements that may have a share, where it is known which models may. It
// packs the inputs of the task vectors, two numbers in a word, which is less data: (m_0, m_1),
// (m_2, m_3), and (bits of the models, base), as low and high halves.
template <int K>
struct PcbWords {
  static constexpr int kPairs = (K + 1) / 2, kCount = kPairs + 1;

  template <int Half>
  __attribute__((always_inline)) static void make(const char* const* in, int64_t bytes, I passing,
                                                  F (&words)[kCount]) {
    PM_UNROLL
    for (int k = 0; k < kPairs; ++k) {
      const U first = load_bits(in[2 * k + 1] + bytes);
      const U second = load_bits(in[2 * k + 1 < K ? 2 * k + 2 : 2 * k + 1] + bytes);
      words[k] = (F)(Half == 0 ? halves_of(first, second << 16) : halves_of(first >> 16, second));
    }
    words[kPairs] = (F)((U)passing | (U)Bf16::load<Half>(in[0] + bytes));
  }
  __attribute__((always_inline)) static I read(const float* words, int64_t stride, F& base,
                                               F (&tau)[K]) {
    const U last = load_bits(words + kPairs * stride);
    base = (F)(last & 0xffff0000u);
    PM_UNROLL
    for (int k = 0; k < K; ++k) {
      const U pair = load_bits(words + k / 2 * stride);
      tau[k] = (F)(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u) - base;
    }
    return (I)(last & 0xffffu);
  }
};

// The merge, block by block: packs the task vectors of the elements that may have a share, computes
// their changes, writes the output. Where most elements have a share, all are computed. In bf16
// most changes are known without scores (pcb_single.h); the remaining elements are packed once
// more.
struct PcbMergeKernel {
  static constexpr int kBlockSize = 2048;
  static constexpr int kStride = kBlockSize + kLanes;  // a vector may be written at the end
  static constexpr int kDenseBlocks = 15;              // before the filter is tried again

  // The selected elements, packed.
  struct Packed {
    float* taus;    // [num_models][kStride]; at first their words, one array more
    float* change;  // [kStride]

    float* tau(int k) const { return taus + static_cast<int64_t>(k) * kStride; }
    // Appends a vector of zeros, so that reads past the end are not NaN.
    void end_at(int64_t count, int arrays) const {
      for (int k = 0; k < arrays; ++k) store_bits(tau(k) + count, U{});
    }
  };

  PcbCall call;
  const float* reals;
  PcbFilter filter;
  PcbSingles singles;
  Packed all;   // elements that may have a share
  Packed rest;  // elements whose scores matter
  F* room;      // [2 * num_models]
  uint32_t chosen[kBlockSize / kLanes];
  int dense = 0;       // coming blocks that are not filtered
  bool large = false;  // whether a block has large magnitudes
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
    all = {floats(call.num_models + 1), floats(1)};
    rest = {floats(call.num_models), floats(1)};
    room = reinterpret_cast<F*>(memory);
    filter = pcb_filter(call);
    singles = pcb_singles(call, filter);
  }

  template <class Io, int Half>
  static __attribute__((always_inline)) void load_taus(int models, const char* const* in,
                                                       int64_t bytes, F* tau) {
    const F base = Io::template load<Half>(in[0] + bytes);
    PM_UNROLL
    for (int k = 0; k < models; ++k) tau[k] = Io::template load<Half>(in[k + 1] + bytes) - base;
  }

  // The two vectors of a step.
  template <class Io, PcbVariant kVariant, int K>
  static __attribute__((always_inline)) void choose(const PcbFilter& filter, const PcbCall& known,
                                                    const char* const* in, int64_t bytes,
                                                    uint32_t* chosen, const Packed& to,
                                                    int64_t& count, U& largest) {
    constexpr int kMost = K > 0 ? K : kFilteredModels;
    F low_tau[kMost], high_tau[kMost];
    I low_passing, high_passing;
    load_taus<Io, 0>(known.num_models, in, bytes, low_tau);
    load_taus<Io, 1>(known.num_models, in, bytes, high_tau);
    constexpr bool kBits = kSingles<Io, K>;
    // In registers: as far as the compiler knows, a store may change anything in memory.
    const uint32_t low =
        lane_bits(pcb_survivors<kVariant, K, kBits>(filter, known, low_tau, largest, low_passing));
    const uint32_t high = lane_bits(
        pcb_survivors<kVariant, K, kBits>(filter, known, high_tau, largest, high_passing));
    const int64_t middle = count + __builtin_popcount(low);
    if constexpr (kBits) {
      F first[PcbWords<K>::kCount], second[PcbWords<K>::kCount];
      PcbWords<K>::template make<0>(in, bytes, low_passing, first);
      PcbWords<K>::template make<1>(in, bytes, high_passing, second);
      PM_UNROLL
      for (int k = 0; k < PcbWords<K>::kCount; ++k) {
        pack(to.tau(k) + count, first[k], low);
        pack(to.tau(k) + middle, second[k], high);
      }
    } else {
      PM_UNROLL
      for (int k = 0; k < known.num_models; ++k) {
        pack(to.tau(k) + count, low_tau[k], low);
        pack(to.tau(k) + middle, high_tau[k], high);
      }
    }
    chosen[0] = low;
    chosen[1] = high;
    count = middle + __builtin_popcount(high);
  }

  // Returns how many elements may have a share.
  template <class Io, PcbVariant kVariant, int K>
  __attribute__((noinline)) int choose_all(const char* const* in, int64_t at, int n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const PcbFilter limits = filter;
    const Packed to = all;
    U largest{};
    int64_t count = 0;
    for (int i = 0; i < n; i += kStep) {
      const int64_t bytes = (at + i) * Io::kBytes;
      uint32_t* masks = chosen + i / kLanes;
      if constexpr (K > 0) prefetch_ahead<Io, K + 1>(in, bytes);
      choose<Io, kVariant, K>(limits, known, in, bytes, masks, to, count, largest);
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
        prefetch_ahead<Io, 1>(&model, 0);
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

  // The same for elements packed as words.
  template <PcbVariant kVariant, int K>
  void change_words(int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      F base, tau[K];
      PcbWords<K>::read(all.taus + i, kStride, base, tau);
      for (int k = 0; k < K; ++k) store_bits(all.tau(k) + i, (U)tau[k]);
    }
    change_all<kVariant, K>(all, n);
  }

  // The same where nothing is large; skips the scores that do not matter.
  template <PcbVariant kVariant, int K>
  __attribute__((noinline)) void change_singles(int64_t n) {
    PcbKnown<kVariant, K> numbers;
    const PcbCall known = numbers.take(call, reals);
    const Packed from = all, more = rest;
    uint32_t masks[kStride / kLanes];
    int64_t count = 0;
    from.end_at(n, PcbWords<K>::kCount);
    for (int64_t i = 0; i < n; i += kLanes) {
      F base, tau[K], change;
      const I passing = PcbWords<K>::read(from.taus + i, kStride, base, tau);
      const uint32_t told =
          lane_bits(pcb_single_change<kVariant>(known, singles, base, tau, passing, change));
      const uint32_t mask = told ^ lane_bits(FloatMasks::at_least(I{}, I{}));
      masks[i / kLanes] = mask;
      PM_UNROLL
      for (int k = 0; k < K; ++k) pack(more.tau(k) + count, tau[k], mask);
      count += __builtin_popcount(mask);
      store_bits(from.change + i, (U)change);
    }
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

  template <class Io, PcbVariant kVariant, int K>
  void change(int count, bool filtered) {
    if constexpr (kSingles<Io, K>) {
      if (filtered && !large && singles.usable) return change_singles<kVariant, K>(count);
      if (filtered) return change_words<kVariant, K>(count);
    }
    if (filtered && !large) return change_all<kVariant, K, false>(all, count);
    change_all<kVariant, K>(all, count);
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
      change<Io, kVariant, K>(count, filtered);
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
