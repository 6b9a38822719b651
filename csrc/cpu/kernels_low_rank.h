// Adds a LoRA adapter to a weight: out = base + scale * (b a). The products of an element are added
// up in floats in the order of the rank, so the bits depend on nothing else.
#pragma once

#include "cpu/elementwise.h"

namespace pymerge {
namespace {

constexpr int kLowRankColumns = 256;  // of a block: its part of `a` stays in the cache
constexpr int kLowRankVectors = 4;    // sums held in registers at once
constexpr int kLowRankRun = kLowRankVectors * kLanes;
static_assert(kLowRankColumns % kLowRankRun == 0 && kLowRankColumns % kStep == 0, "whole vectors");

// Room for one row of a block, and the block's part of `a`.
struct LowRankRoom {
  float* base;
  float* sums;
  char* raw;
  float* factor;  // [rank][kLowRankColumns]

  bool take(int64_t rank) {
    constexpr int64_t row = kLowRankColumns * static_cast<int64_t>(sizeof(double));
    char* memory = static_cast<char*>(thread_workspace(3 * row + rank * row / 2));
    if (memory == nullptr) return false;
    base = reinterpret_cast<float*>(memory);
    sums = reinterpret_cast<float*>(memory + row);
    raw = memory + 2 * row;
    factor = reinterpret_cast<float*>(memory + 3 * row);
    return true;
  }
};

// sums = scale * (row of b) (block of a)
PM_INLINE void low_rank_row(const float* b, int64_t rank, const float* factor, float scale,
                            int padded, float* sums) {
  for (int i = 0; i < padded; i += kLowRankRun) {
    F sum[kLowRankVectors] = {};
    const float* from = factor + i;
    for (int64_t j = 0; j < rank; ++j, from += kLowRankColumns) {
      for (int v = 0; v < kLowRankVectors; ++v) {
        sum[v] = sum[v] + b[j] * (F)load_bits(from + v * kLanes);
      }
    }
    for (int v = 0; v < kLowRankVectors; ++v) {
      store_bits(sums + i + v * kLanes, (U)(sum[v] * scale));
    }
  }
}

// Rows [first, last) of the n columns from `at` on.
PM_INLINE void low_rank_block(const LowRankArgs& args, int64_t first, int64_t last, int64_t at,
                              int n, LowRankRoom& room) {
  const int padded = (n + kLowRankRun - 1) / kLowRankRun * kLowRankRun;
  for (int64_t j = 0; j < args.rank; ++j) {
    float* to = room.factor + j * kLowRankColumns;
    std::memcpy(to, args.a + j * args.columns + at, static_cast<size_t>(n) * sizeof(float));
    for (int i = n; i < padded; ++i) to[i] = 0;
  }
  const float scale = static_cast<float>(args.scale);
  const int bytes = dtype_bytes(args.out.dtype);
  for (int64_t row = first; row < last; ++row) {
    const int64_t start = row * args.columns + at;
    low_rank_row(args.b + row * args.rank, args.rank, room.factor, scale, padded, room.sums);
    if (args.base.data != nullptr) {
      widen_part<float>(args.base, start, n, padded, room.base, room.raw, nullptr);
      for (int i = 0; i < padded; ++i) room.sums[i] = room.base[i] + room.sums[i];
    }
    narrow(room.sums, padded, args.out.dtype, room.raw);
    std::memcpy(static_cast<char*>(args.out.data) + start * bytes, room.raw,
                static_cast<size_t>(n) * bytes);
  }
}

struct LowRankContext {
  const LowRankArgs* args;
  int32_t failed;
};

void low_rank_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<LowRankContext*>(opaque);
  const LowRankArgs& args = *context.args;
  LowRankRoom room;
  if (!room.take(args.rank)) {
    set_flag(&context.failed);
    return;
  }
  for (int64_t at = 0; at < args.columns; at += kLowRankColumns) {
    const int64_t left = args.columns - at;
    const int n = static_cast<int>(left < kLowRankColumns ? left : kLowRankColumns);
    low_rank_block(args, first, last, at, n, room);
  }
}

Status low_rank(const LowRankArgs* args) {
  const bool doubles = args->out.dtype == Dtype::kF64 ||
                       (args->base.data != nullptr && args->base.dtype == Dtype::kF64);
  if (args->rows < 0 || args->columns < 0 || args->rank < 1 || doubles) {
    return Status::kBadArgument;
  }
  if (args->rows == 0 || args->columns == 0) return Status::kOk;
  // One element is `rank` steps of work.
  const int64_t work = args->columns * args->rank;
  const int64_t grain = work >= kGrain ? 1 : kGrain / work;
  LowRankContext context{args, 0};
  parallel_ranges(args->rows, grain, args->execution.num_threads, low_rank_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
