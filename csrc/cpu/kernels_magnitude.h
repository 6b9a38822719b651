// Counting kernels of the exact selection. They make a histogram of magnitudes over a bracket of
// keys, and count the elements equal to one key, chunk by chunk.
#pragma once

#include "cpu/compact.h"
#include "cpu/elementwise.h"

namespace pymerge {
namespace {

constexpr int64_t kCountBlock = 1024;  // elements of base and one model that stay in the L1 cache

struct HistogramContext {
  const HistogramArgs* args;
  int32_t failed;
};

// What one thread counts for one model outside the bins.
struct Sides {
  int64_t below, hot, counted;
};

// The bracket of one model.
template <class Int>
struct Bracket {
  Int lo, hi, hot;  // hi is the last key of the last bin
  int shift;
};

template <class Int>
Bracket<Int> bracket_of(const HistogramArgs& args, int k, Int largest) {
  const int64_t lo = args.lo[k];
  const int shift = static_cast<int>(args.shift[k]);
  const int64_t room = static_cast<int64_t>(largest) - lo;
  const bool fits = args.num_bins <= (room >> shift);
  const int64_t hi = fits ? lo + (args.num_bins << shift) - 1 : static_cast<int64_t>(largest);
  return {static_cast<Int>(lo), static_cast<Int>(hi), static_cast<Int>(args.hot[k]), shift};
}

// n elements, a multiple of kStep, at most kCountBlock; the guess is not below the bracket. `next`
// and `next_base` point to the data of the next call, for prefetching.
template <class Io>
void histogram_block(const char* base, const char* model, int64_t n, const char* next,
                     const char* next_base, const Bracket<int32_t>& bracket, int32_t* bins,
                     Sides& sides) {
  using T = Traits<F>;
  I below{}, hot{};
  const I lo = I{} + bracket.lo, span = I{} + (bracket.hi - bracket.lo);
  const I frequent = I{} + bracket.hot;
  // Keys inside the bracket are few: they are set aside without a branch and counted afterwards.
  int32_t aside[kCountBlock + kLanes];
  int64_t count = 0;
  const auto look = [&](I key) {
    const auto is_hot = T::equal(key, frequent);
    hot = T::count(hot, is_hot);
    below = T::count(below, T::less(key, lo));
    const I offset = key - lo;
    count += compress(aside + count, offset, T::within(offset, span, is_hot));
  };
  for (int64_t i = 0; i < n; i += kStep) {
    const char* b = base + i * Io::kBytes;
    const char* m = model + i * Io::kBytes;
    for (int line = 0; line < kStep * Io::kBytes; line += kLine) {
      __builtin_prefetch(next + i * Io::kBytes + line);
      __builtin_prefetch(next_base + i * Io::kBytes + line);
    }
    look(magnitude_key(Io::template load<0>(m) - Io::template load<0>(b)));
    look(magnitude_key(Io::template load<1>(m) - Io::template load<1>(b)));
  }
  for (int64_t i = 0; i < count; ++i) ++bins[aside[i] >> bracket.shift];
  for (int j = 0; j < kLanes; ++j) {
    sides.below += below[j];
    sides.hot += hot[j];
  }
  sides.counted += count;
}

template <class Int>
void count_key(Int key, const Bracket<Int>& bracket, int32_t* bins, Sides& sides) {
  if (key == bracket.hot) {
    ++sides.hot;
  } else if (key < bracket.lo) {
    ++sides.below;
  } else if (key <= bracket.hi) {
    ++sides.counted;
    ++bins[(key - bracket.lo) >> bracket.shift];
  }
}

// Any dtypes, any count: converted block by block. V is float or double.
template <class V, class Int>
void histogram_mixed(const HistogramArgs& args, int k, int64_t begin, int64_t end,
                     const Bracket<Int>& bracket, Room& room, int32_t* bins, Sides& sides) {
  V* base = reinterpret_cast<V*>(room.data);
  V* model = base + kBlock;
  char* raw = reinterpret_cast<char*>(model + kBlock);
  char* scratch = raw + kBlock * 8;
  const auto convert = [&](const Operand& operand, int64_t at, int n, V* to) {
    const int bytes = dtype_bytes(operand.dtype);
    const int padded = (n + kStep - 1) / kStep * kStep;
    std::memset(raw, 0, static_cast<size_t>(padded) * bytes);
    std::memcpy(raw, static_cast<const char*>(operand.data) + at * bytes,
                static_cast<size_t>(n) * bytes);
    if constexpr (sizeof(V) == 8) {
      widen(operand.dtype, raw, padded, to, reinterpret_cast<float*>(scratch));
    } else {
      widen(operand.dtype, raw, padded, to);
    }
  };
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    convert(args.base, at, n, base);
    convert(args.models[k], at, n, model);
    for (int i = 0; i < n; ++i) {
      const V delta = model[i] - base[i];
      Int key;
      std::memcpy(&key, &delta, sizeof(V));
      count_key<Int>(
          key & (sizeof(V) == 8 ? static_cast<Int>(INT64_MAX) : static_cast<Int>(INT32_MAX)),
          bracket, bins, sides);
    }
  }
}

// counts of one thread: [num_models][num_bins + 3]
int32_t* bins_of(const HistogramArgs& args, int32_t* counts, int64_t k) {
  return counts + k * (args.num_bins + 3) + 1;
}

// One model over [begin, end), any dtypes.
template <class V, class Int>
void histogram_slow(const HistogramArgs& args, int k, int64_t begin, int64_t end, Room& room,
                    int32_t* counts, Sides* sides) {
  constexpr Int largest = sizeof(V) == 8 ? static_cast<Int>(INT64_MAX) : INT32_MAX;
  histogram_mixed<V, Int>(args, k, begin, end, bracket_of<Int>(args, k, largest), room,
                          bins_of(args, counts, k), sides[k]);
}

// One stretch of at most kHotChunk elements, all models.
template <class Io>
void histogram_uniform(const HistogramArgs& args, int64_t begin, int64_t end, Room& room,
                       int32_t* counts, Sides* sides) {
  const int64_t bulk = begin + (end - begin) / kStep * kStep;
  const char* base = static_cast<const char*>(args.base.data);
  for (int64_t at = begin; at < bulk; at += kCountBlock) {
    const int64_t n = bulk - at < kCountBlock ? bulk - at : kCountBlock;
    for (int k = 0; k < args.num_models; ++k) {
      const auto bracket = bracket_of<int32_t>(args, k, INT32_MAX);
      if (bracket.hot >= 0 && bracket.hot < bracket.lo) {
        histogram_slow<float, int32_t>(args, k, at, at + n, room, counts, sides);
        continue;
      }
      const auto at_model = [&](int model) {
        return static_cast<const char*>(args.models[model].data) + at * Io::kBytes;
      };
      const bool last = k + 1 == args.num_models;
      const int64_t block = kCountBlock * Io::kBytes;
      const char* next = last ? at_model(0) + block : at_model(k + 1);
      const char* next_base = base + at * Io::kBytes + (last ? block : 0);
      histogram_block<Io>(base + at * Io::kBytes, at_model(k), n, next, next_base, bracket,
                          bins_of(args, counts, k), sides[k]);
    }
  }
  for (int k = 0; k < args.num_models && bulk < end; ++k) {
    histogram_slow<float, int32_t>(args, k, bulk, end, room, counts, sides);
  }
}

void histogram_stretch(const HistogramArgs& args, const Streams& streams, int64_t begin,
                       int64_t end, Room& room, int32_t* counts, Sides* sides) {
  Dtype dtype;
  if (args.compute == Dtype::kF64 || !streams.uniform(&dtype)) {
    for (int k = 0; k < args.num_models; ++k) {
      args.compute == Dtype::kF64
          ? histogram_slow<double, int64_t>(args, k, begin, end, room, counts, sides)
          : histogram_slow<float, int32_t>(args, k, begin, end, room, counts, sides);
    }
  } else if (dtype == Dtype::kBF16) {
    histogram_uniform<Bf16>(args, begin, end, room, counts, sides);
  } else if (dtype == Dtype::kF16) {
    histogram_uniform<F16>(args, begin, end, room, counts, sides);
  } else {
    histogram_uniform<F32>(args, begin, end, room, counts, sides);
  }
}

void histogram_range(void* opaque, int64_t begin, int64_t end, int thread) {
  auto& context = *static_cast<HistogramContext*>(opaque);
  const HistogramArgs& args = *context.args;
  const int64_t models = args.num_models;
  int32_t* counts = args.counts + thread * models * (args.num_bins + 3);
  const Streams streams{&args.base, args.models, args.num_models,
                        MutableOperand{nullptr, Dtype::kF32, 0}, args.compute};
  const int64_t sides_bytes = models * static_cast<int64_t>(sizeof(Sides));
  Room room;
  if (!room.take(8, 8, sides_bytes)) return set_flag(&context.failed);
  auto* sides = reinterpret_cast<Sides*>(room.data - 64 + Room::bytes(8, 8));
  for (int64_t at = begin; at < end; at += kHotChunk) {
    const int64_t stop = end - at < kHotChunk ? end : at + kHotChunk;
    std::memset(sides, 0, static_cast<size_t>(sides_bytes));
    histogram_stretch(args, streams, at, stop, room, counts, sides);
    for (int64_t k = 0; k < models; ++k) {
      int32_t* bins = bins_of(args, counts, k);
      const Sides& found = sides[k];
      bins[-1] += static_cast<int32_t>(found.below);
      bins[args.num_bins] +=
          static_cast<int32_t>(stop - at - found.below - found.hot - found.counted);
      bins[args.num_bins + 1] += static_cast<int32_t>(found.hot);
      if (args.hot_chunks != nullptr) {
        args.hot_chunks[k * args.num_chunks + at / kHotChunk] = static_cast<int32_t>(found.hot);
      }
    }
  }
}

Status magnitude_histogram(const HistogramArgs* args) {
  if (args->num_models < 1 || args->num_bins < 1 || args->num_slots < 1 || args->numel < 0 ||
      args->numel > INT32_MAX || args->base.data == nullptr) {
    return Status::kBadArgument;
  }
  if (args->hot_chunks != nullptr && args->num_chunks * kHotChunk < args->numel) {
    return Status::kBadArgument;
  }
  for (int k = 0; k < args->num_models; ++k) {
    const int bits = args->compute == Dtype::kF64 ? 63 : 31;
    if (args->lo[k] < 0 || args->shift[k] < 0 || args->shift[k] > bits) return Status::kBadArgument;
    if (bits == 31 && args->lo[k] > INT32_MAX) return Status::kBadArgument;
  }
  HistogramContext context{args, 0};
  const int64_t threads =
      args->execution.num_threads > 0 ? args->execution.num_threads : default_threads();
  const int64_t slots = args->num_slots < threads ? args->num_slots : threads;
  static_assert(kGrain % kHotChunk == 0, "ranges begin at chunks");
  parallel_ranges(args->numel, kGrain, static_cast<int>(slots), histogram_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

struct EqualContext {
  const EqualCountsArgs* args;
  int32_t failed;
};

template <class Io>
int64_t count_equal(const char* base, const char* model, int64_t n, int32_t key) {
  using T = Traits<F>;
  I equal{};
  const I wanted = I{} + key;
  for (int64_t i = 0; i < n; i += kStep) {
    const char* b = base + i * Io::kBytes;
    const char* m = model + i * Io::kBytes;
    const F first = Io::template load<0>(m) - Io::template load<0>(b);
    const F second = Io::template load<1>(m) - Io::template load<1>(b);
    equal = T::count(equal, T::equal(magnitude_key(first), wanted));
    equal = T::count(equal, T::equal(magnitude_key(second), wanted));
  }
  int64_t total = 0;
  for (int j = 0; j < kLanes; ++j) total += equal[j];
  return total;
}

// Here the ranges are ranges of chunks.
void equal_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<EqualContext*>(opaque);
  const EqualCountsArgs& args = *context.args;
  HistogramArgs one{};
  const int64_t lo[1] = {args.key}, zero[1] = {0}, none[1] = {-1};
  one.base = args.base;
  one.models = &args.model;
  one.num_models = 1;
  one.num_bins = 1;
  one.lo = lo;
  one.shift = zero;
  one.hot = none;
  const Streams streams{&args.base, &args.model, 1, MutableOperand{nullptr, Dtype::kF32, 0},
                        args.compute};
  Room room;
  if (!room.take(8, 8, 0)) return set_flag(&context.failed);
  Dtype dtype;
  const bool uniform = streams.uniform(&dtype);
  const char* base = static_cast<const char*>(args.base.data);
  const char* model = static_cast<const char*>(args.model.data);
  for (int64_t j = first; j < last; ++j) {
    int64_t at = j * args.chunk;
    const int64_t end = at + args.chunk < args.numel ? at + args.chunk : args.numel;
    int64_t found = 0;
    if (uniform) {
      const int64_t bulk = (end - at) / kStep * kStep;
      const auto key = static_cast<int32_t>(args.key);
      if (dtype == Dtype::kBF16) {
        found = count_equal<Bf16>(base + at * 2, model + at * 2, bulk, key);
      } else if (dtype == Dtype::kF16) {
        found = count_equal<F16>(base + at * 2, model + at * 2, bulk, key);
      } else {
        found = count_equal<F32>(base + at * 4, model + at * 4, bulk, key);
      }
      at += bulk;
    }
    int32_t bin = 0;
    Sides sides{};
    if (args.compute == Dtype::kF64) {
      histogram_mixed<double, int64_t>(one, 0, at, end, bracket_of<int64_t>(one, 0, INT64_MAX),
                                       room, &bin, sides);
    } else {
      histogram_mixed<float, int32_t>(one, 0, at, end, bracket_of<int32_t>(one, 0, INT32_MAX), room,
                                      &bin, sides);
    }
    args.counts[j] = found + bin;
  }
}

Status magnitude_equal_counts(const EqualCountsArgs* args) {
  const int64_t largest = args->compute == Dtype::kF64 ? INT64_MAX : INT32_MAX;
  if (args->chunk < 1 || args->numel < 0 || args->key < 0 || args->key > largest ||
      args->base.data == nullptr) {
    return Status::kBadArgument;
  }
  EqualContext context{args, 0};
  const int64_t chunks = (args->numel + args->chunk - 1) / args->chunk;
  const int64_t grain = args->chunk < kGrain ? kGrain / args->chunk : 1;
  parallel_ranges(chunks, grain, args->execution.num_threads, equal_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
