// ties, one dtype, K models known at compile time.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"
#include "cuda/ties_points.h"

namespace pymerge {
namespace cuda {

template <class F>
PM_DEVICE TiesCall<F> ties_call(const Head& head, int num_models) {
  const int32_t flags = head.flags;
  TiesCall<F> call{};
  call.num_models = num_models;
  call.divide = (flags & kDivide) != 0;
  call.divide_by_weights = (flags & kDivideByWeights) != 0;
  call.weigh_before = (flags & kWeighBefore) != 0;
  call.weigh_after = (flags & kWeighAfter) != 0;
  call.largest = (flags & kLargest) != 0;
  call.elect_count = (flags & kElectCount) != 0;
  call.zero_step = head.zero_sign < 0 ? -1 : 0;
  call.zero_sign = static_cast<F>(head.zero_sign);
  call.scale = scale_of<F>(head);
  return call;
}

// Weights and thresholds that are read where they are needed, so that they occupy no registers.
template <class F>
struct ModelWeights {
  const Model* models;
  __device__ __forceinline__ F operator[](int k) const { return weight_of<F>(models[k]); }
};

template <class F>
struct ModelThresholds {
  const Model* models;
  __device__ __forceinline__ typename Traits<F>::Bits operator[](int k) const {
    return static_cast<typename Traits<F>::Bits>(models[k].threshold);
  }
};

// The counts of a thread.
struct TiesFound {
  int32_t balance = 0;
  int32_t zero_kept = 0;
  bool nonfinite = false;

  template <class F>
  __device__ __forceinline__ void add(const TiesSigns<F>& signs) {
    balance += static_cast<int32_t>(signs.balance);
    zero_kept += static_cast<int32_t>(signs.zero_kept);
  }
};

PM_DEVICE void report(const TiesFound& found, const Head& head) {
  if ((head.flags & kWantSigns) != 0) {
    const int64_t balance = block_sum(found.balance);
    const int64_t zero_kept = block_sum(found.zero_kept);
    if (threadIdx.x == 0) {
      add_to(head.stats, balance);
      add_to(head.stats + 1, zero_kept);
    }
  }
  if (__syncthreads_or(found.nonfinite) && threadIdx.x == 0) raise_flag(head.stats + 2);
}

// Processes one vector with ties_point_careful. The words of `raw` move down, so that no word is
// selected at run time and the code for one word serves all four; `raw` is used up.
template <class Io, int K>
PM_DEVICE uint4 careful_vector(uint4 (&raw)[K + 1], const TiesCall<float>& call,
                               const int32_t* thresholds, const float* weights, TiesFound& found) {
  uint4 result{};
  int32_t worst = 0;
  TiesSigns<float> signs{};
#pragma unroll 1
  for (int word = 0; word < 4; ++word) {
    float x[Io::kPerWord];
#pragma unroll
    for (int half = 0; half < Io::kPerWord; ++half) {
      const auto load = [&](int k) { return Io::get(raw[k + 1].x, half); };
      x[half] = ties_point_careful<K, float>(Io::get(raw[0].x, half), load, call, thresholds,
                                             weights, worst, signs);
    }
#pragma unroll
    for (int k = 0; k <= K; ++k) raw[k] = make_uint4(raw[k].y, raw[k].z, raw[k].w, 0);
    result = make_uint4(result.y, result.z, result.w, Io::put(x));
  }
  found.nonfinite = found.nonfinite | (worst >= Traits<float>::kInfinity);
  found.add(signs);
  return result;
}

// Minimum blocks per multiprocessor: as many as the registers allow without spills.
constexpr int ties_blocks(int models, TiesForm form) {
  return models <= 2 ? 4 : models <= (form == TiesForm::kCareful ? 4 : 5) ? 3 : models <= 8 ? 2 : 1;
}

// Processes elements begin, begin + step, ... before end of a tile with ties_point_careful.
template <class Io, int K>
PM_DEVICE void careful_elements(const Head& head, int64_t tile, int begin, int end, int step,
                                TiesFound& found) {
  const Model* models = models_of<Model>(head);
  const TiesCall<float> call = ties_call<float>(head, K);
#pragma unroll 1
  for (int i = begin; i < end; i += step) {
    const int64_t at = tile + i;
    int32_t worst = 0;
    TiesSigns<float> signs{};
    const auto load = [&](int k) { return Io::load(models[k].data, at); };
    const float x = ties_point_careful<K, float>(Io::load(head.base, at), load, call,
                                                 ModelThresholds<float>{models},
                                                 ModelWeights<float>{models}, worst, signs);
    found.nonfinite = found.nonfinite | (worst >= Traits<float>::kInfinity);
    found.add(signs);
    if (head.out != nullptr) Io::store(head.out, at, x);
  }
}

// Processes what the vector loop leaves over: steps whose bit is set in `again`, and the end of the
// tile.
template <class Io, int K>
PM_DEVICE void finish_tile(const Head& head, uint32_t again, TiesFound& found) {
  constexpr int kVector = kPerVector<Io>;
  const Tile tile = tile_of_block(head);
  for (int at = threadIdx.x; again != 0; at += kThreads, again >>= 1) {
    if ((again & 1) == 0) continue;
    careful_elements<Io, K>(head, tile.begin, at * kVector, (at + 1) * kVector, 1, found);
  }
  const int done = vectors_of<Io>(head, tile) * kVector;
  careful_elements<Io, K>(head, tile.begin, done + threadIdx.x, tile.count, kThreads, found);
  report(found, head);
}

template <class Io, int K, TiesForm kForm>
__global__ void __launch_bounds__(kThreads, ties_blocks(K, kForm))
    ties_kernel(const __grid_constant__ Table table) {
  constexpr bool kWeighted = kForm == TiesForm::kWeighted;
  const int index = record_of_block<Head>(table);
  const Head& head = record<Head>(table, index);
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const TiesCall<float> call = ties_call<float>(head, K);
  const uint4* in[K + 1];
  int32_t thresholds[K];
  float weights[K], shares[K];
  in[0] = vector_at(head.base, tile.begin, Io::kBytes);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    in[k + 1] = vector_at(models[k].data, tile.begin, Io::kBytes);
    thresholds[k] = static_cast<int32_t>(models[k].threshold);
    weights[k] = models[k].weight32;
    shares[k] = !call.divide ? 0.0f : kWeighted ? weights[k] : 1.0f;
  }
  uint4* out = head.out != nullptr ? vector_at(head.out, tile.begin, Io::kBytes) : nullptr;
  TiesFound found;

  const int vectors = vectors_of<Io>(head, tile);
  static_assert(kTile / kPerVector<Io> <= 32 * kThreads, "a bit for each step of the loop");
  uint32_t again = 0, bit = 1;  // steps that ties_point_finite could not do
#pragma unroll 1
  for (int at = threadIdx.x; at < vectors; at += kThreads, bit <<= 1) {
    uint4 raw[K + 1];
#pragma unroll
    for (int k = 0; k <= K; ++k) raw[k] = load_vector(in[k], at);
    uint4 result;
    if constexpr (kForm == TiesForm::kCareful) {
      result = careful_vector<Io, K>(raw, call, thresholds, weights, found);
    } else {
      bool odd = false;
      TiesSigns<float> signs{};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float x[Io::kPerWord];
#pragma unroll
        for (int half = 0; half < Io::kPerWord; ++half) {
          const auto load = [&](int k) { return Io::get(word_of(raw[k + 1], word), half); };
          x[half] = ties_point_finite<K, kWeighted, kForm == TiesForm::kSigns>(
              Io::get(word_of(raw[0], word), half), load, call, thresholds, weights, shares, odd,
              signs);
        }
        set_word(result, word, Io::put(x));
      }
      if (odd) again |= bit;
      if (kForm == TiesForm::kSigns && !odd) found.add(signs);
    }
    if (out != nullptr) store_vector(out, at, result);
  }
  finish_tile<Io, K>(record<Head>(table, forget(index)), again, found);
}

template <class Io, TiesForm kForm>
struct TiesInstances {
  template <int K>
  struct Of {
    static Kernel kernel() { return ties_kernel<Io, K, kForm>; }
  };
  static Kernel pick(int num_models) {
    return pick_instance<Of>(num_models, std::make_integer_sequence<int, kUnrolledModels>());
  }
};

template <class Io>
Kernel pick_ties(int num_models, TiesForm form) {
  switch (form) {
    case TiesForm::kPlain:
      return TiesInstances<Io, TiesForm::kPlain>::pick(num_models);
    case TiesForm::kWeighted:
      return TiesInstances<Io, TiesForm::kWeighted>::pick(num_models);
    case TiesForm::kSigns:
      return TiesInstances<Io, TiesForm::kSigns>::pick(num_models);
    case TiesForm::kCareful:
      return TiesInstances<Io, TiesForm::kCareful>::pick(num_models);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace pymerge
