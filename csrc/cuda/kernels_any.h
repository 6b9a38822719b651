// weighted_sum and ties for all other operands: mixed dtypes, doubles, any address, any number of
// models. Each thread takes one element at a time, and neighbouring threads load neighbouring
// elements.
#pragma once

#include "cuda/elements.h"
#include "cuda/kernels_ties.h"
#include "cuda/values.h"
#include "math/weighted_sum.h"

namespace pymerge {
namespace cuda {

template <class F>
__global__ void __launch_bounds__(kThreads)
    any_weighted_sum_kernel(const __grid_constant__ Table table) {
  const Head& head = record<Head>(table, record_of_block<Head>(table));
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const bool has_base = head.base != nullptr;
  const bool divide = (head.flags & kDivide) != 0;
  const F divisor = divisor_of<F>(head), scale = scale_of<F>(head);
  bool finite = true;
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    const F base = has_base ? load_any<F>(head.base, head.base_dtype, at) : F{};
    F sum = 0;
    for (int k = 0; k < table.num_models; ++k) {
      F x = load_any<F>(models[k].data, models[k].dtype, at);
      if (has_base) x = x - base;
      sum = weighted_sum_add(sum, x, weight_of<F>(models[k]));
    }
    const F result = has_base ? task_arithmetic_finish(base, sum, divide, divisor, scale)
                              : weighted_sum_finish(sum, divide, divisor);
    finite = finite & (magnitude_key(result) < Traits<F>::kInfinity);
    store_any<F>(head.out, head.out_dtype, at, result);
  }
  if (__syncthreads_or(!finite) && threadIdx.x == 0) raise_flag(head.stats);
}

template <class F>
__global__ void __launch_bounds__(kThreads) any_ties_kernel(const __grid_constant__ Table table) {
  const Head& head = record<Head>(table, record_of_block<Head>(table));
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const TiesCall<F> call = ties_call<F>(head, table.num_models);
  TiesFound found;
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    typename Traits<F>::Bits worst = 0;
    TiesSigns<F> signs{};
    const auto load = [&](int k) { return load_any<F>(models[k].data, models[k].dtype, at); };
    const F x =
        ties_point_careful<0, F>(load_any<F>(head.base, head.base_dtype, at), load, call,
                                 ModelThresholds<F>{models}, ModelWeights<F>{models}, worst, signs);
    found.nonfinite = found.nonfinite | (worst >= Traits<F>::kInfinity);
    found.add(signs);
    if (head.out != nullptr) store_any<F>(head.out, head.out_dtype, at, x);
  }
  report(found, head);
}

}  // namespace cuda
}  // namespace pymerge
