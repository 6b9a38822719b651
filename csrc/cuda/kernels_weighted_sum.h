// weighted_sum, one dtype: K models, with and without a base.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"
#include "cuda/values.h"
#include "math/weighted_sum.h"

namespace pymerge {
namespace cuda {

template <int K>
struct SumCall {
  float weights[K];
  float scale, divisor;
  bool divide;
};

template <int K, bool kBase, class Load>
PM_DEVICE float weighted_sum_point(Load load, const SumCall<K>& call) {
  const float base = kBase ? load(0) : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float x = load(k + (kBase ? 1 : 0));
    if (kBase) x = x - base;
    sum = weighted_sum_add(sum, x, call.weights[k]);
  }
  if (!kBase) return weighted_sum_finish(sum, call.divide, call.divisor);
  return task_arithmetic_finish(base, sum, call.divide, call.divisor, call.scale);
}

template <int K>
PM_DEVICE SumCall<K> sum_call(const Head& head) {
  const Model* models = models_of<Model>(head);
  SumCall<K> call;
#pragma unroll
  for (int k = 0; k < K; ++k) call.weights[k] = models[k].weight32;
  call.scale = head.scale32;
  call.divisor = head.divisor32;
  call.divide = (head.flags & kDivide) != 0;
  return call;
}

// Processes the end of a tile, one element at a time; returns whether all results are finite.
template <class Io, int K, bool kBase>
PM_DEVICE bool sum_elements(const Head& head) {
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const SumCall<K> call = sum_call<K>(head);
  bool finite = true;
#pragma unroll 1
  for (int i = vectors_of<Io>(head, tile) * kPerVector<Io> + threadIdx.x; i < tile.count;
       i += kThreads) {
    const int64_t at = tile.begin + i;
    const auto load = [&](int stream) {
      const bool is_base = kBase && stream == 0;
      return Io::load(is_base ? head.base : models[stream - (kBase ? 1 : 0)].data, at);
    };
    const float x = weighted_sum_point<K, kBase>(load, call);
    finite = finite & is_finite(x);
    Io::store(head.out, at, x);
  }
  return finite;
}

// Minimum blocks per multiprocessor: as many as the registers allow without spills.
constexpr int sum_blocks(int streams) { return streams <= 4 ? 4 : streams <= 9 ? 2 : 1; }

template <class Io, int K, bool kBase>
__global__ void __launch_bounds__(kThreads)
    weighted_sum_kernel(const __grid_constant__ Table table) {
  constexpr int kStreams = K + (kBase ? 1 : 0);
  constexpr int kUnroll = kStreams <= 3 ? 2 : 1;  // vectors that a thread loads at once
  const int index = record_of_block<Head>(table);
  const Head& head = record<Head>(table, index);
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const SumCall<K> call = sum_call<K>(head);
  const uint4* in[kStreams];
  if (kBase) in[0] = vector_at(head.base, tile.begin, Io::kBytes);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    in[k + (kBase ? 1 : 0)] = vector_at(models[k].data, tile.begin, Io::kBytes);
  }
  uint4* out = vector_at(head.out, tile.begin, Io::kBytes);
  bool finite = true;

  const int vectors = vectors_of<Io>(head, tile);
#pragma unroll 1
  for (int first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
    uint4 raw[kUnroll][kStreams];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kThreads;
      if (at >= vectors) continue;
#pragma unroll
      for (int i = 0; i < kStreams; ++i) raw[u][i] = load_vector(in[i], at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kThreads;
      if (at >= vectors) continue;
      uint4 result;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float x[Io::kPerWord];
#pragma unroll
        for (int half = 0; half < Io::kPerWord; ++half) {
          const auto load = [&](int i) { return Io::get(word_of(raw[u][i], word), half); };
          x[half] = weighted_sum_point<K, kBase>(load, call);
          finite = finite & is_finite(x[half]);
        }
        set_word(result, word, Io::put(x));
      }
      store_vector(out, at, result);
    }
  }
  const Head& again = record<Head>(table, forget(index));
  finite = sum_elements<Io, K, kBase>(again) & finite;
  if (__syncthreads_or(!finite) && threadIdx.x == 0) raise_flag(again.stats);
}

// The streaming floor: reads kStreams streams and writes one, computing nothing. Elements have 16
// bits.
template <int kStreams>
__global__ void __launch_bounds__(kThreads, sum_blocks(kStreams))
    floor_kernel(const __grid_constant__ Table table) {
  constexpr int kUnroll = kStreams <= 3 ? 2 : 1;
  const Head& head = record<Head>(table, record_of_block<Head>(table));
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const uint4* in[kStreams];
#pragma unroll
  for (int i = 0; i < kStreams; ++i) in[i] = vector_at(models[i].data, tile.begin, 2);
  uint4* out = vector_at(head.out, tile.begin, 2);
  const int vectors = (head.flags & kAligned) != 0 ? tile.count / 8 : 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
    uint4 any[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kThreads;
      if (at >= vectors) continue;
      uint4 raw[kStreams];
#pragma unroll
      for (int i = 0; i < kStreams; ++i) raw[i] = load_vector(in[i], at);
      any[u] = raw[0];
#pragma unroll
      for (int i = 1; i < kStreams; ++i) {
        any[u].x |= raw[i].x;
        any[u].y |= raw[i].y;
        any[u].z |= raw[i].z;
        any[u].w |= raw[i].w;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = first + u * kThreads;
      if (at < vectors) store_vector(out, at, any[u]);
    }
  }
#pragma unroll 1
  for (int i = vectors * 8 + threadIdx.x; i < tile.count; i += kThreads) {
    uint16_t any = 0;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) any |= reinterpret_cast<const uint16_t*>(in[k])[i];
    reinterpret_cast<uint16_t*>(out)[i] = any;
  }
}

template <class Io, bool kBase>
struct SumInstances {
  template <int K>
  struct Of {
    static Kernel kernel() { return weighted_sum_kernel<Io, K, kBase>; }
  };
  static Kernel pick(int num_models) {
    return pick_instance<Of>(num_models, std::make_integer_sequence<int, kUnrolledModels>());
  }
};

template <class Io>
Kernel pick_weighted_sum(int num_models, bool has_base) {
  return has_base ? SumInstances<Io, true>::pick(num_models)
                  : SumInstances<Io, false>::pick(num_models);
}

}  // namespace cuda
}  // namespace pymerge
