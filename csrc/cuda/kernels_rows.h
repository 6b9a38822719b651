// Weighted sums with separate weights for each row, which are in device memory.
#pragma once

#include "cuda/elements.h"
#include "cuda/reduce.h"
#include "cuda/values.h"

namespace pymerge {
namespace cuda {

template <class Io>
__global__ void __launch_bounds__(kThreads) row_sum_kernel(const __grid_constant__ Table table) {
  using F = typename Elements<Io>::F;
  const RowSumHead& head = record<RowSumHead>(table, record_of_block<RowSumHead>(table));
  const Model* models = models_of<Model>(head);
  const Tile tile = tile_of_block(head);
  const bool has_base = head.base != nullptr;
  int64_t row = (tile.begin + threadIdx.x) / head.columns;
  int64_t column = (tile.begin + threadIdx.x) % head.columns;
  bool finite = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    const F base = has_base ? Elements<Io>::load(head.base, head.base_dtype, at) : F{};
    F sum = 0;
#pragma unroll 4
    for (int k = 0; k < table.num_models; ++k) {
      F x = Elements<Io>::load(models[k].data, models[k].dtype, at);
      if (has_base) x = x - base;
      sum = sum + static_cast<F>(head.weights[k * head.stride + row]) * x;
    }
    const F result = has_base ? base + sum : sum;
    finite = finite & is_finite(result);
    Elements<Io>::store(head.out, head.out_dtype, at, result);
    column += kThreads;
    if (column >= head.columns) {
      row += column / head.columns;
      column %= head.columns;
    }
  }
  if (__syncthreads_or(!finite) && threadIdx.x == 0) raise_flag(head.stats);
}

}  // namespace cuda
}  // namespace pymerge
