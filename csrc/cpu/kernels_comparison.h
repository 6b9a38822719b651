// Compares the task vectors of several models: norms, products, distances, and how often elements
// are equal, kept by a trim, or of opposite signs. Chunk by chunk: sums are in the order of
// kernels_sums.h, the rest uses bit masks and integers.
#pragma once

#include "cpu/comparison_masks.h"
#include "cpu/elementwise.h"

namespace pymerge {
namespace {

// sum + x. Multiplying by 1 is exact, so this is a plain sum, but it runs on the multiply units:
// the add units are busy with the differences.
PM_INLINE F plus(F sum, F x) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)x, _mm512_set1_ps(1.0f), (__m512)sum);
#else
  return sum + x;
#endif
}

// |x_i - x_j| of pairs i < j.
template <int kCount>
void distances(const float* values, double* found) {
  constexpr int kPairs = kCount * (kCount - 1) / 2;
  double lanes[kPairs][kSumLanes];
  for (int part = 0; part < kSumLanes; part += kLanes) {
    D sums[kPairs][2] = {};
    for (int begin = part; begin < kSumChunk; begin += kSumGroup * kSumLanes) {
      F group[kPairs] = {};
      for (int i = begin; i < begin + kSumGroup * kSumLanes; i += kSumLanes) {
        F x[kCount];
        int pair = 0;
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) x[k] = (F)load_bits(values + k * kSumChunk + i);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 4
          for (int j = k + 1; j < kCount; ++j, ++pair)
            group[pair] = plus(group[pair], (F)magnitude_key(x[k] - x[j]));
        }
      }
#pragma GCC unroll 6
      for (int pair = 0; pair < kPairs; ++pair) add_halves(sums[pair], group[pair]);
    }
#pragma GCC unroll 6
    for (int pair = 0; pair < kPairs; ++pair) {
      store_bits(lanes[pair] + part, (U)sums[pair][0]);
      store_bits(lanes[pair] + part + kDLanes, (U)sums[pair][1]);
    }
  }
  for (int pair = 0; pair < kPairs; ++pair) found[pair] = add_lanes(lanes[pair]);
}

// The same for two models at any addresses.
void distance(const float* a, const float* b, double* found) {
  double lanes[kSumLanes];
  for (int part = 0; part < kSumLanes; part += kLanes) {
    D sums[2] = {};
    for (int begin = part; begin < kSumChunk; begin += kSumGroup * kSumLanes) {
      F group{};
      for (int i = begin; i < begin + kSumGroup * kSumLanes; i += kSumLanes) {
        group += (F)magnitude_key((F)load_bits(a + i) - (F)load_bits(b + i));
      }
      add_halves(sums, group);
    }
    store_bits(lanes + part, (U)sums[0]);
    store_bits(lanes + part + kDLanes, (U)sums[1]);
  }
  *found = add_lanes(lanes);
}

void distance(const double* a, const double* b, double* found) {
  const auto step = [&](int i, double* group) {
    const double apart = a[i] - b[i];
    group[0] += apart < 0 ? -apart : apart;
  };
  grouped_sums<1, double>(step, found);
}

template <class V>
void distances(const V* values, int count, double* found) {
  if constexpr (sizeof(V) == 4) {
    if (count == 2) return distances<2>(values, found);
    if (count == 3) return distances<3>(values, found);
    if (count == 4) return distances<4>(values, found);
  }
  for (int k = 0; k < count; ++k) {
    for (int j = k + 1; j < count; ++j, ++found) {
      distance(values + static_cast<int64_t>(k) * kSumChunk,
               values + static_cast<int64_t>(j) * kSumChunk, found);
    }
  }
}

int64_t comparison_rows(int64_t models, int64_t levels) {
  return 1 + models * (models + 1) + models * levels;
}

// Workspace of one thread: a chunk of every input, masks, and results.
template <class V>
struct ComparisonRoom {
  using Int = typename KeyOf<V>::Type;
  V* base;
  V* values;  // [models][kSumChunk]
  V* more;    // [2][kSumChunk]
  char* raw;
  char* scratch;
  uint64_t* masks;  // [models][2 + levels][kBitWords]: negative, not zero, kept
  Int* thresholds;  // [models][1 + levels]
  double* squares;  // [models][1 + levels], magnitudes first
  double* found;    // [rows]
  double* total;    // [rows]
  W* counts;        // [1 + levels][width], the lanes to be added up
  int64_t* equal;   // [pairs]
  int64_t* histogram;

  bool take(const ComparisonArgs& args) {
    const int64_t models = args.num_models, levels = args.num_levels;
    const int64_t rows = comparison_rows(models, levels);
    const int64_t stride = (2 + levels) * kBitWords;
    const int64_t pairs = models * (models - 1) / 2, width = level_width(models);
    const int64_t numbers = pairs + models * (kComparisonBins + 1);
    const int64_t counters = (1 + levels) * width * static_cast<int64_t>(sizeof(W));
    const int64_t chunk = kSumChunk * static_cast<int64_t>(sizeof(V));
    const int64_t bytes = (models + 3) * chunk + 2 * kSumChunk * 8 +
                          8 * (models * (stride + 2 * (1 + levels)) + 2 * rows + numbers) +
                          counters;
    char* memory = static_cast<char*>(thread_workspace(bytes));
    if (memory == nullptr) return false;
    const auto cut = [&](int64_t size) {
      char* from = memory;
      memory += size;
      return from;
    };
    counts = reinterpret_cast<W*>(cut(counters));
    base = reinterpret_cast<V*>(cut(chunk));
    values = reinterpret_cast<V*>(cut(models * chunk));
    more = reinterpret_cast<V*>(cut(2 * chunk));
    raw = cut(kSumChunk * 8);
    scratch = cut(kSumChunk * 8);
    masks = reinterpret_cast<uint64_t*>(cut(8 * models * stride));
    thresholds = reinterpret_cast<Int*>(cut(8 * models * (1 + levels)));
    squares = reinterpret_cast<double*>(cut(8 * models * (1 + levels)));
    found = reinterpret_cast<double*>(cut(8 * rows));
    total = reinterpret_cast<double*>(cut(8 * rows));
    equal = reinterpret_cast<int64_t*>(cut(8 * numbers));
    histogram = equal + pairs;
    std::memset(counts, 0, static_cast<size_t>(counters));
    std::memset(equal, 0, static_cast<size_t>(numbers) * 8);
    for (int64_t k = 0; k < models; ++k) {
      Int* own = thresholds + k * (1 + levels);
      own[0] = 1;
      for (int64_t level = 0; level < levels; ++level) {
        const int64_t key = args.thresholds[level * models + k];
        own[1 + level] = static_cast<Int>(key > KeyOf<V>::kLargest ? KeyOf<V>::kLargest : key);
      }
    }
    return true;
  }
};

// Histograms of the magnitudes of elements [first, last) of each model: bins of an eighth of an
// octave, and one for zeros.
template <class V>
void count_magnitudes(const V* values, int count, int first, int last, int64_t* histogram) {
  constexpr int shift = sizeof(V) == 4 ? 20 : 49;
  constexpr int bias = sizeof(V) == 4 ? 127 : 1023;
  constexpr int lowest = (bias + kComparisonLow) * 8;
  constexpr int kAtOnce = 4;  // models: equal bins in succession would wait for each other
  int32_t bins[kAtOnce][kSumChunk];
  for (int k = 0; k < count; k += kAtOnce) {
    const int own = count - k < kAtOnce ? count - k : kAtOnce;
    for (int j = 0; j < own; ++j) {
      const V* model = values + static_cast<int64_t>(k + j) * kSumChunk;
      for (int i = first; i < last; ++i) {
        const auto key = scalar_key(model[i]);
        int bin = static_cast<int>(key >> shift) - lowest;
        bin = bin < 0 ? 0 : bin;
        bin = bin >= kComparisonBins ? kComparisonBins - 1 : bin;
        bins[j][i] = (key == 0 ? kComparisonBins : bin) + j * (kComparisonBins + 1);
      }
    }
    int64_t* to = histogram + k * (kComparisonBins + 1);
    if (own == kAtOnce) {
      for (int i = first; i < last; ++i) {
        ++to[bins[0][i]];
        ++to[bins[1][i]];
        ++to[bins[2][i]];
        ++to[bins[3][i]];
      }
      continue;
    }
    for (int i = first; i < last; ++i) {
      for (int j = 0; j < own; ++j) ++to[bins[j][i]];
    }
  }
}

// The chunk after the one at `at`.
Ahead ahead_of(const Operand& operand, int64_t at) {
  const int bytes = dtype_bytes(operand.dtype);
  return {static_cast<const char*>(operand.data) + (at + kSumChunk) * bytes, bytes};
}

template <class V>
double base_square(const V* base, Ahead ahead) {
  double total;
  lane_sums<1>(
      [&](int i, D* sums) __attribute__((always_inline)) {
        __builtin_prefetch(ahead.data + i * ahead.bytes);
        const D x = load_doubles(base + i);
        sums[0] = add_product<V>(sums[0], x, x);
      },
      &total);
  return total;
}

template <class V>
void count_equal_slowly(const ComparisonArgs& args, ComparisonRoom<V>& room, int64_t at, int n) {
  int64_t* counts = room.equal;
  V* other = room.more + kSumChunk;
  for (int i = 0; i < args.num_models; ++i) {
    widen_part(args.models[i], at, n, kSumChunk, room.more, room.raw, room.scratch);
    for (int j = i + 1; j < args.num_models; ++j, ++counts) {
      widen_part(args.models[j], at, n, kSumChunk, other, room.raw, room.scratch);
      for (int e = 0; e < n; ++e) {
        const bool same = std::memcmp(room.more + e, other + e, sizeof(V)) == 0;
        *counts += same || (room.more[e] == V(0) && other[e] == V(0)) ? 1 : 0;
      }
    }
  }
}

// n <= kSumChunk elements from `at` on.
template <class V>
void compare_chunk(const ComparisonArgs& args, ComparisonRoom<V>& room, int64_t at, int n,
                   bool uniform) {
  const int models = args.num_models, levels = args.num_levels;
  const int64_t stride = (2 + levels) * kBitWords;
  widen_part(args.base, at, n, kSumChunk, room.base, room.raw, room.scratch);
  for (int k = 0; k < models; ++k) {
    V* own = room.values + static_cast<int64_t>(k) * kSumChunk;
    widen_part(args.models[k], at, n, kSumChunk, own, room.raw, room.scratch,
               static_cast<const V*>(room.base));
    uint64_t* masks = room.masks + k * stride;
    double* sums = room.squares + k * (1 + levels);
    all_masks(own, room.thresholds + k * (1 + levels), 1 + levels, masks, masks + kBitWords, sums,
              ahead_of(args.models[k], at));
    room.found[1 + k] = sums[0];
  }
  double* found = room.found;
  *found = base_square(room.base, ahead_of(args.base, at));
  found += 1 + models;
  distances(room.values, models, found);
  found += models * (models - 1) / 2;
  gram_in_lanes(room.values, models, found);
  found += models * (models + 1) / 2;
  for (int k = 0; k < models; ++k) {
    const double* sums = room.squares + k * (1 + levels);
    for (int level = 1; level <= levels; ++level) *found++ = sums[level];
  }
  const int64_t width = level_width(models);
  for (int level = 0; level <= levels; ++level) {
    count_level(models, room.masks, room.masks + (1 + level) * kBitWords, stride,
                room.counts + level * width);
  }
  if (uniform && n == kSumChunk) {
    dtype_bytes(args.base.dtype) == 2 ? count_equal<2>(args.models, at, models, room.equal)
                                      : count_equal<4>(args.models, at, models, room.equal);
  } else {
    count_equal_slowly(args, room, at, n);
  }
  int first = 0, last = n;
  if (args.every > 1) {  // a part of the chunk that differs between chunks
    constexpr int part = kSumChunk / kComparisonEvery;
    const auto number = static_cast<uint32_t>((args.start + at) / kSumChunk);
    first = static_cast<int>((number * 2654435761u) >> 28) * part;
    last = first + part < n ? first + part : n;
  }
  count_magnitudes(room.values, models, first, last, room.histogram);
}

struct ComparisonContext {
  const ComparisonArgs* args;
  bool uniform;
  int32_t failed;
};

template <class V>
bool compare_segments(const ComparisonArgs& args, bool uniform, int64_t first, int64_t last) {
  ComparisonRoom<V> room;
  if (!room.take(args)) return false;
  const int64_t rows = comparison_rows(args.num_models, args.num_levels);
  for (int64_t segment = first; segment < last; ++segment) {
    const int64_t begin = segment * kHotChunk;
    const int64_t end = begin + kHotChunk < args.numel ? begin + kHotChunk : args.numel;
    for (int64_t row = 0; row < rows; ++row) room.total[row] = 0;
    for (int64_t at = begin; at < end; at += kSumChunk) {
      const int n = static_cast<int>(end - at < kSumChunk ? end - at : kSumChunk);
      compare_chunk(args, room, at, n, uniform);
      for (int64_t row = 0; row < rows; ++row) room.total[row] += room.found[row];
    }
    for (int64_t row = 0; row < rows; ++row) {
      args.sums[row * args.num_segments + segment] = room.total[row];
    }
  }
  const auto add = [](int64_t* to, const int64_t* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (from[i] != 0) __atomic_fetch_add(to + i, from[i], __ATOMIC_RELAXED);
    }
  };
  const int64_t models = args.num_models, pairs = models * (models - 1) / 2;
  int64_t* to = args.counts;
  for (int64_t i = 0; i < (1 + args.num_levels) * level_width(models); ++i, ++to) {
    int64_t total = 0;
    for (int lane = 0; lane < PM_VECTOR_BYTES / 8; ++lane) {
      total += static_cast<int64_t>(room.counts[i][lane]);
    }
    add(to, &total, 1);
  }
  add(to, room.equal, pairs + models * (kComparisonBins + 1));
  return true;
}

void compare_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<ComparisonContext*>(opaque);
  const ComparisonArgs& args = *context.args;
  const bool done = args.compute == Dtype::kF64
                        ? compare_segments<double>(args, false, first, last)
                        : compare_segments<float>(args, context.uniform, first, last);
  if (!done) set_flag(&context.failed);
}

Status compare(const ComparisonArgs* args) {
  if (args->num_models < 1 || args->num_models > kMostCompared || args->num_levels < 0 ||
      args->numel < 0 || args->base.data == nullptr || args->start % kHotChunk != 0 ||
      (args->every != 1 && args->every != kComparisonEvery) ||
      args->num_segments != (args->numel + kHotChunk - 1) / kHotChunk) {
    return Status::kBadArgument;
  }
  for (int64_t i = 0; i < int64_t{args->num_levels} * args->num_models; ++i) {
    if (args->thresholds[i] < 1) return Status::kBadArgument;
  }
  const Streams streams{&args->base, args->models, args->num_models,
                        MutableOperand{nullptr, Dtype::kF32, 0}, args->compute};
  Dtype dtype;
  ComparisonContext context{args, streams.uniform(&dtype), 0};
  parallel_ranges(args->num_segments, 1, args->execution.num_threads, compare_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
