// The counting kernels of the exact selection. A block counts one chunk of one model. The blocks of
// a chunk's models are adjacent, so that all but one of them find the base in the L2 cache.
#pragma once

#include <type_traits>

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"
#include "cuda/values.h"

namespace pymerge {
namespace cuda {

// Keys where base and model share one dtype.
template <class Io>
struct UniformKeys {
  using F = float;
  static constexpr int kVector = kPerVector<Io>;
  const uint4* base;
  const uint4* model;

  __device__ __forceinline__ UniformKeys(const MagnitudeHead& head, const MagnitudeModel& one,
                                         int64_t begin)
      : base(vector_at(head.base, begin, Io::kBytes)),
        model(vector_at(one.data, begin, Io::kBytes)) {}

  __device__ __forceinline__ bool aligned() const {
    return ((reinterpret_cast<uintptr_t>(base) | reinterpret_cast<uintptr_t>(model)) & 15) == 0;
  }
  __device__ __forceinline__ int32_t key(int64_t i) const {
    return magnitude_key(Io::load(model, i) - Io::load(base, i));
  }
};

// Keys of any dtypes at any addresses, one at a time.
template <class AnyF>
struct MixedKeys {
  using F = AnyF;
  static constexpr int kVector = 1;
  const void* base;
  const void* model;
  int32_t base_dtype, model_dtype;
  int64_t begin;

  __device__ __forceinline__ MixedKeys(const MagnitudeHead& head, const MagnitudeModel& one,
                                       int64_t begin)
      : base(head.base),
        model(one.data),
        base_dtype(head.base_dtype),
        model_dtype(one.dtype),
        begin(begin) {}

  __device__ __forceinline__ typename Traits<F>::Bits key(int64_t i) const {
    return magnitude_key(load_any<F>(model, model_dtype, begin + i) -
                         load_any<F>(base, base_dtype, begin + i));
  }
};

// The bracket of a block, and the counts of a thread.
template <class Int, Bins kBins>
struct Bracket {
  using Word = std::conditional_t<sizeof(Int) == 8, uint64_t, uint32_t>;
  Int lo, hot;
  Word span;  // keys lo .. lo + span have bins
  int shift;
  int32_t* bins;
  int32_t hot_count, below, inside;

  // As few instructions as possible: the kernel is limited by them as much as by memory.
  __device__ __forceinline__ void count(Int key) {
    const bool is_hot = key == hot;
    hot_count += is_hot ? 1 : 0;
    if (kBins == Bins::kNone) return;
    const Int offset = key - lo;
    below += offset < 0 ? 1 : 0;
    if ((static_cast<Word>(offset) <= span) & !is_hot) {
      ++inside;
      atomicAdd((kBins == Bins::kShared ? dynamic_shared() : bins) + (offset >> shift), 1);
    }
  }
  // The number below the bracket without the hot ones.
  __device__ __forceinline__ int32_t below_only() const {
    return hot >= 0 && hot < lo ? below - hot_count : below;
  }
};

template <class Io, class AnyBracket>
PM_DEVICE void count_vectors(const UniformKeys<Io>& keys, int64_t vectors, AnyBracket& bracket) {
  constexpr int kUnroll = 4;  // vectors that a thread loads at once
  for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
    uint4 base[kUnroll], model[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u * kThreads;
      if (at >= vectors) continue;
      base[u] = load_once(keys.base + at);
      model[u] = load_once(keys.model + at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads >= vectors) continue;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
#pragma unroll
        for (int half = 0; half < Io::kPerWord; ++half) {
          bracket.count(magnitude_key(Io::get(word_of(model[u], word), half) -
                                      Io::get(word_of(base[u], word), half)));
        }
      }
    }
  }
}

template <class Keys, Bins kBins>
__global__ void __launch_bounds__(kThreads, 3)
    magnitude_kernel(const __grid_constant__ Table table) {
  using Int = typename Traits<typename Keys::F>::Bits;
  const MagnitudeHead& head = record<MagnitudeHead>(table, record_of_block<MagnitudeHead>(table));
  const int block = static_cast<int>(blockIdx.x) - head.first_block;
  const int k = block % table.num_models;
  const int64_t chunk = block / table.num_models;
  const MagnitudeModel& model = models_of<MagnitudeModel>(head)[k];
  const int64_t begin = chunk * head.chunk;
  const int64_t left = head.numel - begin;
  const int64_t size = left < head.chunk ? left : head.chunk;
  const Keys keys(head, model, begin);
  using AnyBracket = Bracket<Int, kBins>;
  AnyBracket bracket{};
  bracket.lo = static_cast<Int>(model.lo);
  bracket.span = static_cast<typename AnyBracket::Word>(model.hi - model.lo);
  bracket.hot = static_cast<Int>(model.hot);
  bracket.shift = model.shift;
  bracket.bins = model.counts + 1;
  if (kBins == Bins::kShared) {
    for (int bin = threadIdx.x; bin < head.num_bins; bin += kThreads) dynamic_shared()[bin] = 0;
    __syncthreads();
  }

  int64_t counted = 0;
  if constexpr (Keys::kVector > 1) {
    if (keys.aligned()) {
      const int64_t vectors = size / Keys::kVector;
      count_vectors(keys, vectors, bracket);
      counted = vectors * Keys::kVector;
    }
  }
#pragma unroll 1
  for (int64_t i = counted + threadIdx.x; i < size; i += kThreads) bracket.count(keys.key(i));

  const int64_t hot = block_sum(bracket.hot_count);
  if (kBins != Bins::kNone) {
    const int64_t below = block_sum(bracket.below_only());
    const int64_t inside = block_sum(bracket.inside);
    if (threadIdx.x == 0) {
      add_to(model.counts, below);
      add_to(model.counts + head.num_bins + 1, size - below - inside - hot);
      add_to(model.counts + head.num_bins + 2, hot);
    }
  }
  if (kBins == Bins::kShared) {  // all threads have been waited for in the sums
    for (int bin = threadIdx.x; bin < head.num_bins; bin += kThreads) {
      add_to(model.counts + 1 + bin, dynamic_shared()[bin]);
    }
  }
  if (threadIdx.x == 0) {
    if (model.hot_chunks != nullptr) model.hot_chunks[chunk] = static_cast<int32_t>(hot);
    if (model.hot_chunks64 != nullptr) model.hot_chunks64[chunk] = hot;
  }
}

template <class Keys>
Kernel pick_magnitudes(Bins bins) {
  return bins == Bins::kNone     ? magnitude_kernel<Keys, Bins::kNone>
         : bins == Bins::kShared ? magnitude_kernel<Keys, Bins::kShared>
                                 : magnitude_kernel<Keys, Bins::kDevice>;
}

}  // namespace cuda
}  // namespace pymerge
