// Sums in a fixed order: element i of a chunk of kSumChunk goes to lane i mod 16, each lane adds up
// in order in doubles, then the lanes are added; the chunks of a row are added in order. 16 threads
// are the 16 lanes of a stretch, which is a chunk or a row; a block has 16 stretches.
//
// Policies define the summands. There are two kinds: over models (Terms), several at a time, and
// over pairs of models (Pairs).
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"

namespace pymerge {
namespace cuda {

constexpr int kSumLanes = 16;
constexpr int kStretches = kThreads / kSumLanes;  // of a block

// The stretches of a block, and the part of the stretch in which a thread has a lane.
struct Stretch {
  int64_t first;   // number of the block's first stretch
  int64_t begin;   // first element of this thread's
  int64_t length;  // of this stretch; 0: there is none
  int64_t chunks;  // of the longest stretch of the block
  int lane;
};

PM_DEVICE Stretch stretch_of_thread(const RowsHead& head) {
  Stretch s;
  const int64_t length = head.columns > 0 ? head.columns : kSumChunk;
  s.first = static_cast<int64_t>(blockIdx.x - head.first_block) * kStretches;
  s.begin = (s.first + threadIdx.x / kSumLanes) * length;
  const int64_t left = head.numel - s.begin;
  s.length = left <= 0 ? 0 : left < length ? left : length;
  s.chunks = (length + kSumChunk - 1) / kSumChunk;
  s.lane = threadIdx.x % kSumLanes;
  return s;
}

// The number of elements of chunk `chunk` in this thread's lane.
PM_DEVICE int steps_of(const Stretch& s, int64_t chunk) {
  const int64_t left = s.length - chunk * kSumChunk;
  const int count = left <= 0 ? 0 : left < kSumChunk ? static_cast<int>(left) : kSumChunk;
  return (count - s.lane + kSumLanes - 1) / kSumLanes;
}

// Shared memory to combine lanes, kAtOnce sums at a time. Rows of 17 start in different banks.
constexpr int kAtOnce = 8;
using LaneRoom = double[kAtOnce][kStretches][kSumLanes + 1];

PM_DEVICE LaneRoom& lane_room() {
  __shared__ LaneRoom room;
  return room;
}

// Combines the lanes of one chunk, for all stretches of a block, and adds the result to that of the
// chunks before. row_of(sum, slot) is the row of the output, or -1.
template <class Policy, int kSums, class RowOf>
PM_DEVICE void join_lanes(const typename Policy::Sum (&mine)[kSums][Policy::kSlots],
                          const RowsHead& head, const Stretch& s, bool begins, RowOf row_of) {
  constexpr int kSlots = Policy::kSlots, kRows = kSums * kSlots;
  LaneRoom& room = lane_room();
  const int stretch = threadIdx.x / kSumLanes;
#pragma unroll
  for (int first = 0; first < kRows; first += kAtOnce) {
    __syncthreads();  // the previous contents have been read
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int at = first + r;
      if (at < kRows) room[r][stretch][s.lane] = mine[at / kSlots][at % kSlots];
    }
    __syncthreads();
    // Neighbouring threads have neighbouring stretches, which are adjacent in the output.
    const int r = threadIdx.x / kStretches, of = threadIdx.x % kStretches;
    if (r >= kAtOnce || first + r >= kRows || s.first + of >= head.stride) continue;
    const int slot = (first + r) % kSlots;
    const int64_t row = row_of((first + r) / kSlots, slot);
    if (row < 0) continue;
    double total = room[r][of][0];
#pragma unroll
    for (int lane = 1; lane < kSumLanes; ++lane) {
      total = Policy::join(slot, total, room[r][of][lane]);
    }
    total = total + 0.0;  // no -0 among extremes: it has no order
    double* to = static_cast<double*>(head.out) + row * head.stride + s.first + of;
    *to = begins ? total : Policy::join(slot, *to, total);
  }
}

// Loads one element of the inputs: models, or their deltas if there is a base.
template <class Io>
struct Inputs {
  using F = typename Elements<Io>::F;
  const RowsHead& head;
  int64_t at;
  bool has_base;
  F base;

  __device__ __forceinline__ Inputs(const RowsHead& head, int64_t at)
      : head(head), at(at), has_base(head.base != nullptr), base(0) {
    if (has_base) base = Elements<Io>::load(head.base, head.base_dtype, at);
  }
  __device__ __forceinline__ F plain(const Model& model) const {
    return Elements<Io>::load(model.data, model.dtype, at);
  }
  __device__ __forceinline__ F delta(const Model& model) const {
    const F x = plain(model);
    return has_base ? x - base : x;
  }
};

// Sums over models: kTermModels at a time, the base read anew for each of these groups.
constexpr int kTermModels = 4;

template <class Io, class Terms>
__global__ void __launch_bounds__(kThreads, 2) terms_kernel(const __grid_constant__ Table table) {
  using F = typename Elements<Io>::F;
  constexpr int kSlots = Terms::kSlots;
  const RowsHead& head = record<RowsHead>(table, record_of_block<RowsHead>(table));
  const auto* models = models_of<typename Terms::ModelType>(head);
  const int count = table.num_models;
  const int terms = Terms::terms(count);
  const Stretch s = stretch_of_thread(head);
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t begin = s.begin + chunk * kSumChunk + s.lane;
    const int steps = steps_of(s, chunk);
    for (int first = 0; first < terms; first += kTermModels) {
      typename Terms::Sum sums[kTermModels][kSlots];
#pragma unroll
      for (int r = 0; r < kTermModels * kSlots; ++r) {
        sums[r / kSlots][r % kSlots] = Terms::begin(r % kSlots);
      }
#pragma unroll 2
      for (int step = 0; step < steps; ++step) {
        const Inputs<Io> inputs(head, begin + step * kSumLanes);
        const auto shared = Terms::template shared<F>(inputs, head, models, count);
#pragma unroll
        for (int u = 0; u < kTermModels; ++u) {
          if (first + u >= terms) continue;
          Terms::template add<F>(sums[u], inputs, shared, head,
                                 models[Terms::model(head, first + u)]);
        }
      }
      join_lanes<Terms>(sums, head, s, chunk == 0, [&](int u, int slot) {
        const int term = first + u;
        return term < terms ? static_cast<int64_t>(term) * kSlots + slot : -1;
      });
    }
  }
}

// Sums over pairs of models first .. first + kI - 1 and second .. second + kJ - 1; if these are the
// same models, over pairs i <= j.
template <class Io, class Pairs, int kI, int kJ, bool kSame>
PM_DEVICE void sum_pairs(const RowsHead& head, int count, int first, int second) {
  using F = typename Elements<Io>::F;
  constexpr int kPairs = kSame ? kI * (kI + 1) / 2 : kI * kJ;
  constexpr int kSlots = Pairs::kSlots;
  const Model* models = models_of<Model>(head);
  const Stretch s = stretch_of_thread(head);
  // A model beyond the last one is read as the last; its sums are discarded.
  const auto model = [&](int k) -> const Model& { return models[k < count ? k : count - 1]; };
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t begin = s.begin + chunk * kSumChunk + s.lane;
    const int steps = steps_of(s, chunk);
    typename Pairs::Sum sums[kPairs][kSlots];
#pragma unroll
    for (int r = 0; r < kPairs * kSlots; ++r) {
      sums[r / kSlots][r % kSlots] = Pairs::begin(r % kSlots);
    }
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      const Inputs<Io> inputs(head, begin + step * kSumLanes);
      F x[kI], y[kJ];
#pragma unroll
      for (int i = 0; i < kI; ++i) x[i] = inputs.delta(model(first + i));
#pragma unroll
      for (int j = 0; j < kJ; ++j) y[j] = kSame ? x[j] : inputs.delta(model(second + j));
      int r = 0;
#pragma unroll
      for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int j = kSame ? i : 0; j < kJ; ++j) {
          Pairs::template add<F>(sums[r++], x[i], y[j], kSame && i == j, models, first + i,
                                 second + j, count);
        }
      }
    }
    join_lanes<Pairs>(sums, head, s, chunk == 0, [&](int pair, int slot) {
      int i = 0;
      if (kSame) {
        while (pair >= kJ - i) pair -= kJ - i++;
      } else {
        i = pair / kJ;
        pair %= kJ;
      }
      const int a = first + i, b = second + pair + (kSame ? i : 0);
      return a < count && b < count ? Pairs::row(slot, a, b, count) : int64_t{-1};
    });
  }
}

// K models known at compile time; K = 0 takes any number, kPairModels by kPairModels.
constexpr int kPairModels = 4;

template <class Io, int K, class Pairs>
__global__ void __launch_bounds__(kThreads, K == 0 || K > 4 ? 1 : 2)
    pairs_kernel(const __grid_constant__ Table table) {
  const RowsHead& head = record<RowsHead>(table, record_of_block<RowsHead>(table));
  if constexpr (K > 0) {
    sum_pairs<Io, Pairs, K, K, true>(head, K, 0, 0);
  } else {
    const int count = table.num_models;
#pragma unroll 1
    for (int first = 0; first < count; first += kPairModels) {
      sum_pairs<Io, Pairs, kPairModels, kPairModels, true>(head, count, first, first);
#pragma unroll 1
      for (int second = first + kPairModels; second < count; second += kPairModels) {
        sum_pairs<Io, Pairs, kPairModels, kPairModels, false>(head, count, first, second);
      }
    }
  }
}

template <class Io, class Pairs>
struct PairsInstances {
  template <int K>
  struct Of {
    static Kernel kernel() { return pairs_kernel<Io, K, Pairs>; }
  };
};

// Unrolled for up to `most` models of one dtype.
template <class Pairs, int most>
Kernel pick_pairs(Kind kind, int num_models) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    if constexpr (!Elements<Io>::kMixed) {
      if (num_models <= most) {
        return pick_instance<PairsInstances<Io, Pairs>::template Of>(
            num_models, std::make_integer_sequence<int, most>());
      }
    }
    return pairs_kernel<Io, 0, Pairs>;
  });
}

}  // namespace cuda
}  // namespace pymerge
