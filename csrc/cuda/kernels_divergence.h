// Divergences of rows (math/divergence.h), summed in the order of kernels_sums.h, and the kernels
// that use them as weights. The table of divergences is in device memory: a kernel never reads the
// rows that it writes.
#pragma once

#include "cuda/kernels_sums.h"
#include "cuda/reduce.h"
#include "cuda/values.h"
#include "math/divergence.h"

namespace pymerge {
namespace cuda {

struct LargestOfRow {
  using Sum = double;
  static constexpr int kSlots = 2;
  PM_DEVICE double begin() { return -__builtin_inf(); }
  PM_DEVICE double join(int, double a, double b) { return b > a ? b : a; }  // NaN is left out
  __device__ __forceinline__ explicit LargestOfRow(const RowsHead&, int64_t) {}
  __device__ __forceinline__ void add(double (&sums)[2], double x, double y) const {
    sums[0] = join(0, sums[0], x);
    sums[1] = join(1, sums[1], y);
  }
};

struct SumOfRow {
  using Sum = double;
  PM_DEVICE double begin() { return 0.0; }
  PM_DEVICE double join(int, double a, double b) { return a + b; }
  PM_DEVICE double given(const RowsHead& head, int64_t column, int row) {
    return static_cast<const double*>(head.out)[row * head.stride + column];
  }
};

struct ExpOfRow : SumOfRow {
  static constexpr int kSlots = 2;
  double x_max, y_max;
  __device__ __forceinline__ ExpOfRow(const RowsHead& head, int64_t column)
      : x_max(given(head, column, 0)), y_max(given(head, column, 1)) {}
  __device__ __forceinline__ void add(double (&sums)[2], double x, double y) const {
    sums[0] += exp64(x - x_max);
    sums[1] += exp64(y - y_max);
  }
};

struct DivergenceOfRow : SumOfRow {
  static constexpr int kSlots = 1;
  DivergenceRow<double> row;
  __device__ __forceinline__ DivergenceOfRow(const RowsHead& head, int64_t column)
      : row(divergence_row(given(head, column, 0), given(head, column, 1), given(head, column, 2),
                           given(head, column, 3))) {}
  __device__ __forceinline__ void add(double (&sums)[1], double x, double y) const {
    sums[0] += divergence_point(x, y, row, [](bool chosen) { return chosen; });
  }
};

template <class Io, class Terms, int kFirst>
__global__ void __launch_bounds__(kThreads, 2)
    divergence_kernel(const __grid_constant__ Table table) {
  const RowsHead& head = record<RowsHead>(table, record_of_block<RowsHead>(table));
  const Model& model = models_of<Model>(head)[0];
  const Stretch s = stretch_of_thread(head);
  const int64_t column = s.first + threadIdx.x / kSumLanes;
  // A thread without a stretch reads the same data as another one, and adds nothing.
  const Terms terms(head, column < head.stride ? column : head.stride - 1);
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t begin = s.begin + chunk * kSumChunk + s.lane;
    const int steps = steps_of(s, chunk);
    double sums[1][Terms::kSlots];
#pragma unroll
    for (int slot = 0; slot < Terms::kSlots; ++slot) sums[0][slot] = Terms::begin();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Inputs<Io> inputs(head, begin + step * kSumLanes);
      terms.add(sums[0], static_cast<double>(inputs.plain(model)),
                static_cast<double>(inputs.base));
    }
    join_lanes<Terms>(sums, head, s, chunk == 0,
                      [](int, int slot) { return static_cast<int64_t>(kFirst + slot); });
  }
}

// |delta| D_row, or the base plus the deltas of sufficient importance. `weights` are the
// divergences, `scale` is the threshold.
template <class Io, bool kMerge>
__global__ void __launch_bounds__(kThreads) importance_kernel(const __grid_constant__ Table table) {
  using F = typename Elements<Io>::F;
  const RowSumHead& head = record<RowSumHead>(table, record_of_block<RowSumHead>(table));
  const Model& model = models_of<Model>(head)[0];
  const Tile tile = tile_of_block(head);
  int64_t row = (tile.begin + threadIdx.x) / head.columns;
  int64_t column = (tile.begin + threadIdx.x) % head.columns;
  bool finite = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.count; i += kThreads) {
    const int64_t at = tile.begin + i;
    const F base = Elements<Io>::load(head.base, head.base_dtype, at);
    const F x = Elements<Io>::load(model.data, model.dtype, at);
    finite = finite & is_finite(base) & is_finite(x);
    const F delta = x - base;
    const F importance = static_cast<F>(fabs(static_cast<double>(delta)) * head.weights[row]);
    F result = importance;
    if (kMerge) result = importance >= scale_of<F>(head) ? base + delta : base;
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
