// One driver for all ops where each output element depends only on the same element of the base and
// the models.
//
// A Point defines the computation:
//   ModelType: the type of a model in the records
//   kNumbers<K>: how many numbers of a call follow its models
//   get<K, F>(base, load, head, models, numbers, count, at, finite): load(k) returns
//   element `at` of model k, count is K where K > 0; sets `finite` to false if an input is not
//   finite.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"

namespace pymerge {
namespace cuda {

// The rest of a tile after the vectors, or all of it, one element at a time.
template <class Io, int K, class Point>
PM_DEVICE bool point_elements(const Head& head, int num_models, int begin) {
  using F = typename Elements<Io>::F;
  const auto* models = models_of<typename Point::ModelType>(head);
  const Tile tile = tile_of_block(head);
  bool finite = true;
#pragma unroll 1
  for (int i = begin + threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    const auto load = [&](int k) {
      return Elements<Io>::load(models[k].data, models[k].dtype, at);
    };
    const F base = Elements<Io>::load(head.base, head.base_dtype, at);
    const F x = Point::template get<K, F>(
        base, load, head, models, numbers_after<F>(models, num_models), num_models, at, finite);
    Elements<Io>::store(head.out, head.out_dtype, at, x);
  }
  return finite;
}

// Minimum blocks per multiprocessor: as many as the registers allow without spills.
constexpr int point_blocks(int models) { return models <= 4 ? 3 : 2; }

// One dtype, K models known at compile time; K = 0 takes any number, and Io may be Mixed then.
template <class Io, int K, class Point>
__global__ void __launch_bounds__(kThreads, point_blocks(K))
    point_kernel(const __grid_constant__ Table table) {
  const int index = record_of_block<Head>(table);
  bool finite = true;
  if constexpr (K > 0) {
    constexpr int kUnroll = K <= 2 ? 2 : 1;  // vectors that a thread loads at once
    // Local copies, of which only the used parts stay in registers; without them the compiler would
    // reload the record for each element.
    const Head head = record<Head>(table, index);
    const auto* of_record = models_of<typename Point::ModelType>(record<Head>(table, index));
    const Tile tile = tile_of_block(head);
    typename Point::ModelType models[K];
#pragma unroll
    for (int k = 0; k < K; ++k) models[k] = of_record[k];
    constexpr int64_t kNumbers = Point::template kNumbers<K>;
    float numbers[kNumbers > 0 ? kNumbers : 1];
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) numbers[i] = numbers_after<float>(of_record, K)[i];
    // If there are many models, their addresses are reloaded for each vector.
    const auto in = [&](int i) {
      const void* data = i == 0 ? head.base : K < 7 ? models[i - 1].data : of_record[i - 1].data;
      return vector_at(data, tile.begin, Io::kBytes);
    };
    uint4* out = vector_at(head.out, tile.begin, Io::kBytes);
    const int vectors = vectors_of<Io>(head, tile);
#pragma unroll 1
    for (int first = threadIdx.x; first < vectors; first += kThreads * kUnroll) {
      uint4 raw[kUnroll][K + 1];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = first + u * kThreads;
        if (at >= vectors) continue;
#pragma unroll
        for (int k = 0; k <= K; ++k) raw[u][k] = load_vector(in(k), at);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int at = first + u * kThreads;
        if (at >= vectors) continue;
        const int64_t here = tile.begin + at * kPerVector<Io>;
        uint4 result;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          float x[Io::kPerWord];
#pragma unroll
          for (int half = 0; half < Io::kPerWord; ++half) {
            const auto load = [&](int k) { return Io::get(word_of(raw[u][k + 1], word), half); };
            x[half] = Point::template get<K, float>(Io::get(word_of(raw[u][0], word), half), load,
                                                    head, models, numbers, K,
                                                    here + word * Io::kPerWord + half, finite);
          }
          set_word(result, word, Io::put(x));
        }
        store_vector(out, at, result);
      }
    }
  }
  const Head& again = record<Head>(table, forget(index));
  int done = 0;
  if constexpr (K > 0) done = vectors_of<Io>(again, tile_of_block(again)) * kPerVector<Io>;
  const int count = K > 0 ? K : table.num_models;
  finite = point_elements<Io, K, Point>(again, count, done) & finite;
  if (__syncthreads_or(!finite) && threadIdx.x == 0) raise_flag(again.stats);
}

template <class Io, class Point>
struct PointInstances {
  template <int K>
  struct Of {
    static Kernel kernel() { return point_kernel<Io, K, Point>; }
  };
  // Unrolled for 1 .. most models; for others one that loops.
  template <int most>
  static Kernel pick(int num_models) {
    if constexpr (most > 0) {
      if (num_models <= most) {
        return pick_instance<Of>(num_models, std::make_integer_sequence<int, most>());
      }
    }
    return point_kernel<Io, 0, Point>;
  }
};

}  // namespace cuda
}  // namespace pymerge
