// PCB-Merging (math/pcb.h): scores and the merge. Arithmetic dominates, so neighbouring threads
// take neighbouring elements, which is enough to load and store at full width.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/reduce.h"
#include "cuda/values.h"
#include "math/pcb.h"

namespace pymerge {
namespace cuda {

template <class Io, int K>
PM_DEVICE void load_all(const Head& head, const Model* models, int64_t at, float& base,
                        float (&tau)[K]) {
  base = Elements<Io>::load(head.base, head.base_dtype, at);
#pragma unroll
  for (int k = 0; k < K; ++k) tau[k] = Elements<Io>::load(models[k].data, models[k].dtype, at);
#pragma unroll
  for (int k = 0; k < K; ++k) tau[k] = tau[k] - base;
}

// Checks the dtype once for all operands, so that their loads are in flight together.
template <int K>
PM_DEVICE void load_streams(const Head& head, const Model* models, int64_t at, float& base,
                            float (&tau)[K]) {
  if ((head.flags & kUniform) == 0) return load_all<Mixed<float>, K>(head, models, at, base, tau);
  switch (static_cast<Dtype>(head.base_dtype)) {
    case Dtype::kBF16:
      return load_all<Bf16, K>(head, models, at, base, tau);
    case Dtype::kF16:
      return load_all<F16, K>(head, models, at, base, tau);
    default:
      return load_all<F32, K>(head, models, at, base, tau);
  }
}

// Deltas and scores of any number of models, computed on demand.
struct TausAt {
  const Model* models;
  int64_t at;
  float base;

  __device__ __forceinline__ float operator[](int k) const {
    return load_any<float>(models[k].data, models[k].dtype, at) - base;
  }
};

struct ScoresAt {
  const PcbCall& call;
  const TausAt& tau;
  float total;

  __device__ __forceinline__ float operator[](int i) const {
    return pcb_score(call, tau, total, i);
  }
};

constexpr int pcb_blocks(int models) { return models <= 4 ? 4 : 2; }

// K models known at compile time; K = 0 takes any number.
template <int K, PcbVariant kVariant, bool kMerge>
__global__ void __launch_bounds__(kThreads, pcb_blocks(K))
    pcb_kernel(const __grid_constant__ Table table) {
  const RowsHead& head = record<RowsHead>(table, record_of_block<RowsHead>(table));
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const int count = K > 0 ? K : table.num_models;
  const PcbCall call = pcb_call(kVariant, count, numbers_after<float>(models, count));
  bool finite = true;
  const auto put = [&](int64_t at, float base, const auto& tau, const auto& scores) {
    PM_UNROLL
    for (int k = 0; k < count; ++k) finite = finite & is_finite(tau[k]);
    if constexpr (kMerge) {
      store_any<float>(head.out, head.out_dtype, at, pcb_merge(call, base, tau, scores));
    } else {
      float* const out = static_cast<float*>(head.out) + at;
      PM_UNROLL
      for (int k = 0; k < count; ++k) {
        const float score = scores[k];
        out[k * head.stride] = pcb_positive(call, score);
      }
    }
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    if constexpr (K > 0) {
      float base, tau[K], scores[K];
      load_streams<K>(head, models, at, base, tau);
      pcb_scores_of<kUnrolledPoints>(call, tau, scores);
      put(at, base, tau, scores);
    } else {
      const float base = load_any<float>(head.base, head.base_dtype, at);
      const TausAt tau{models, at, base};
      put(at, base, tau, ScoresAt{call, tau, pcb_total<float>(call, tau)});
    }
  }
  if (__syncthreads_or(!finite) && threadIdx.x == 0) raise_flag(head.stats);
}

template <PcbVariant kVariant, bool kMerge>
struct PcbInstances {
  template <int K>
  struct Of {
    static Kernel kernel() { return pcb_kernel<K, kVariant, kMerge>; }
  };
  static Kernel pick(int num_models) {
    if (num_models > kUnrolledPoints) return pcb_kernel<0, kVariant, kMerge>;
    return pick_instance<Of>(num_models, std::make_integer_sequence<int, kUnrolledPoints>());
  }
};

template <PcbVariant kVariant>
Kernel pick_pcb(int num_models, bool merge) {
  return merge ? PcbInstances<kVariant, true>::pick(num_models)
               : PcbInstances<kVariant, false>::pick(num_models);
}

}  // namespace cuda
}  // namespace pymerge
