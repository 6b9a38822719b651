// Trimmed task vectors stored as bit masks and values: their weighted sum, and their dot products
// with a gradient. Any number of models, one after the other. Gives the same bits as the CPU's
// kernels (cpu/kernels_packed.h): elements that are not kept add nothing.
#pragma once

#include "cuda/kernels_sums.h"
#include "cuda/sum_terms.h"
#include "math/weighted_sum.h"

namespace pymerge {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaskWords = kSumChunk / 32;  // of a chunk: one for each thread of a warp
constexpr int kOfWarp = 512;                // elements that a warp takes at a time
constexpr int kAlone = 4;                   // elements that a thread takes one by one
static_assert(kMaskWords == kWarp && kSumChunk % kOfWarp == 0 && kTile % kSumChunk == 0, "chunks");

// The sum of x over the threads of the warp before this one.
PM_DEVICE int warp_sum_before(int x) {
  const int lane = threadIdx.x % kWarp;
  int total = x;
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const int other = warp_read(total, lane - apart);
    total += lane >= apart ? other : 0;
  }
  return total - x;
}

// The bits of a word below bit `bit`, which is less than 32.
PM_DEVICE uint32_t below(uint32_t word, int bit) { return word & ((1u << bit) - 1u); }

PM_DEVICE uint32_t mask_word(const PackedModel& model, int64_t word, int64_t numel) {
  return word * 32 < numel ? model.mask[word] : 0;
}

// The values of a model from its value number `first` on. Offsets from there are counted in 32
// bits.
template <class Io>
PM_DEVICE const char* values_from(const PackedModel& model, int64_t first) {
  int64_t bytes;
  if constexpr (Elements<Io>::kMixed) {
    const auto dtype = static_cast<Dtype>(model.dtype);
    bytes = dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2;
  } else {
    bytes = Io::kBytes;
  }
  return static_cast<const char*>(model.data) + first * bytes;
}

// Elements [begin, begin + count) of a tensor, processed by one warp: each thread has runs of kPer
// elements, next to the runs of its neighbours. With kPer > 1 no element is missing.
template <class Io, int kPer, int kOfThread>
struct Part {
  using F = typename Elements<Io>::F;
  static constexpr int kRuns = kOfThread / kPer;
  int64_t begin;
  int count;

  __device__ __forceinline__ int place(int run) const {
    return (run * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kPer;
  }
  __device__ __forceinline__ void load(const PackedHead& head, F (&x)[kOfThread]) const {
#pragma unroll
    for (int s = 0; s < kRuns; ++s) {
      if constexpr (kPer == 1) {
        const int64_t at = begin + place(s);
        x[s] = place(s) < count ? Elements<Io>::load(head.base, head.base_dtype, at) : F{};
      } else {
        const uint4 raw = load_once(vector_at(head.base, begin + place(s), Io::kBytes));
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          x[s * kPer + j] = Io::get(word_of(raw, j / Io::kPerWord), j % Io::kPerWord);
        }
      }
    }
  }
  __device__ __forceinline__ void store(const PackedHead& head, const F (&x)[kOfThread]) const {
#pragma unroll
    for (int s = 0; s < kRuns; ++s) {
      if constexpr (kPer == 1) {
        const int64_t at = begin + place(s);
        if (place(s) < count) Elements<Io>::store(head.out, head.out_dtype, at, x[s]);
      } else {
        uint4 raw;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          float some[Io::kPerWord];
#pragma unroll
          for (int j = 0; j < Io::kPerWord; ++j) some[j] = x[s * kPer + word * Io::kPerWord + j];
          set_word(raw, word, Io::put(some));
        }
        store_once(vector_at(head.out, begin + place(s), Io::kBytes), raw);
      }
    }
  }
};

// out = base + sum_k w_k t_k for one part. All threads of the warp must call it.
template <class Io, int kPer, int kOfThread>
PM_DEVICE void sum_part(const PackedHead& head, int num_models,
                        const Part<Io, kPer, kOfThread>& part) {
  using F = typename Elements<Io>::F;
  const PackedModel* models = models_of<PackedModel>(head);
  const int lane = threadIdx.x % kWarp;
  const int bit = lane * kPer % 32;  // in a word, the bit of the first element of each run
  const int64_t chunk = part.begin / kSumChunk;
  const int first_word = static_cast<int>(part.begin % kSumChunk) / 32;
  F base[kOfThread], sum[kOfThread];
  part.load(head, base);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) sum[i] = 0;
  // The mask that locates the next model's values is loaded while this model's values are added.
  uint32_t next = mask_word(models[0], chunk * kMaskWords + lane, head.numel);
  int64_t next_first = models[0].offsets[chunk];
#pragma unroll 1
  for (int k = 0; k < num_models; ++k) {
    const PackedModel& model = models[k];
    const uint32_t own = next;
    const int64_t first = next_first;
    if (k + 1 < num_models) {
      next = mask_word(models[k + 1], chunk * kMaskWords + lane, head.numel);
      next_first = models[k + 1].offsets[chunk];
    }
    const int count = bits_in(own);
    const int before = warp_sum_before(count);
    const int last = warp_read(before + count, kWarp - 1) - 1;
    if (last < 0) continue;  // the model keeps nothing of the chunk
    const char* values = values_from<Io>(model, first);
    const F weight = weight_of<F>(model);
#pragma unroll
    for (int s = 0; s < Part<Io, kPer, kOfThread>::kRuns; ++s) {
      const int word = first_word + s * kPer + lane * kPer / 32;
      const auto whole = static_cast<uint32_t>(warp_read(static_cast<int32_t>(own), word));
      const uint32_t bits = whole >> bit;
      int at = warp_read(before, word) + bits_in(below(whole, bit));
      F value[kPer];  // all loads are in flight before the first value is needed
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        // Where nothing is kept, the next value is read but not used.
        value[j] = Elements<Io>::load(values, model.dtype, min(at, last));
        at += static_cast<int>(bits >> j & 1u);
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = s * kPer + j;
        const F more = weighted_sum_add(sum[i], value[j] - base[i], weight);
        if ((bits >> j & 1u) != 0) sum[i] = more;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) sum[i] = base[i] + sum[i];
  part.store(head, sum);
}

template <class Io>
__global__ void __launch_bounds__(kThreads) packed_sum_kernel(const __grid_constant__ Table table) {
  const PackedHead& head = record<PackedHead>(table, record_of_block<PackedHead>(table));
  const Tile tile = tile_of_block(head);
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) / kWarp * kOfWarp; at < tile.count;
       at += kThreads / kWarp * kOfWarp) {
    const int left = tile.count - at;
    if constexpr (!Elements<Io>::kMixed) {
      if (left >= kOfWarp && (head.flags & kAligned) != 0) {
        using Vectors = Part<Io, kPerVector<Io>, kOfWarp / kWarp>;
        sum_part(head, table.num_models, Vectors{tile.begin + at, kOfWarp});
        continue;
      }
    }
#pragma unroll 1
    for (int more = 0; more < kOfWarp && more < left; more += kAlone * kWarp) {
      using Alone = Part<Io, 1, kAlone>;
      sum_part(head, table.num_models, Alone{tile.begin + at + more, left - more});
    }
  }
}

// Dot products with the gradient; 16 threads for each chunk, as for all sums. They step through its
// words together, and each counts the elements kept before its own.
template <class Io>
__global__ void __launch_bounds__(kThreads, 2)
    packed_dots_kernel(const __grid_constant__ Table table) {
  using F = typename Elements<Io>::F;
  const PackedHead& head = record<PackedHead>(table, record_of_block<PackedHead>(table));
  const PackedModel* models = models_of<PackedModel>(head);
  const int count = table.num_models;
  const Stretch s = stretch_of_thread(head);
  const int64_t chunk = s.begin / kSumChunk;
  for (int first = 0; first < count; first += kTermModels) {
    double sums[kTermModels][1];
    int64_t place[kTermModels];
#pragma unroll
    for (int u = 0; u < kTermModels; ++u) {
      sums[u][0] = 0;
      place[u] = first + u < count && s.length > 0 ? models[first + u].offsets[chunk] : 0;
    }
#pragma unroll 1
    for (int begin = s.lane; begin - s.lane < s.length; begin += 32) {
      F gradient[2], base[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = begin + half * kSumLanes;
        const bool there = at < s.length;
        gradient[half] =
            there ? Elements<Io>::load(head.gradient, head.gradient_dtype, s.begin + at) : F{};
        base[half] = there ? Elements<Io>::load(head.base, head.base_dtype, s.begin + at) : F{};
      }
#pragma unroll
      for (int u = 0; u < kTermModels; ++u) {
        if (first + u >= count) continue;
        const PackedModel& model = models[first + u];
        const uint32_t bits = model.mask[chunk * kMaskWords + begin / 32];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int bit = half * kSumLanes + s.lane;
          const bool kept = (bits >> bit & 1u) != 0 && begin + half * kSumLanes < s.length;
          const int64_t at = place[u] + bits_in(below(bits, bit));
          const F value = kept ? Elements<Io>::load(model.data, model.dtype, at) : base[half];
          const double more = add_product(sums[u][0], gradient[half], value - base[half]);
          sums[u][0] = kept ? more : sums[u][0];
        }
        place[u] += bits_in(bits);
      }
    }
    join_lanes<DotTerms>(sums, head, s, true, [&](int u, int) {
      return first + u < count ? static_cast<int64_t>(first + u) : int64_t{-1};
    });
  }
}

}  // namespace cuda
}  // namespace pymerge
