// Sums over chunks of kSumChunk elements, in doubles and always in one order: element i of a chunk
// goes to lane i mod 16, each lane adds up in order, then the lanes are added, 0 to 15. The
// summands are exact or rounded once: the product of two floats fits in a double.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/pcb_sums.h"
#include "cpu/sum_lanes.h"
#include "math/sparse.h"

namespace pymerge {
namespace {

// Keeps of `values` those that model k of a sparse merge keeps. index: that of the first value.
template <class V>
void keep_sparse(const SumsArgs& args, int k, int64_t index, const V* values, V* kept) {
  using Int = typename KeyOf<V>::Type;
  constexpr int64_t largest = KeyOf<V>::kLargest;
  const bool nothing = args.lo[k] > largest;
  const Int lo = static_cast<Int>(nothing ? largest : args.lo[k]);
  const Int last = static_cast<Int>(args.last[k] > largest ? largest : args.last[k]);
  const bool drawn = args.seeds != nullptr;
  const auto first = drawn ? static_cast<uint32_t>(args.seeds[2 * k]) : 0u;
  const auto second = drawn ? static_cast<uint32_t>(args.seeds[2 * k + 1]) : 0u;
  const bool limited = drawn && args.chances == nullptr;
  const auto limit = limited ? static_cast<uint32_t>(args.limits[k]) : UINT32_MAX;
  const auto start = static_cast<uint32_t>(index);
  for (int i = 0; i < kSumChunk; ++i) {
    const Int key = scalar_key(values[i]);
    const bool in_band = (key >= lo) & (key <= last) & !nothing;
    const uint32_t hash = mask_hash(start + static_cast<uint32_t>(i), first, second);
    kept[i] = in_band & (hash <= limit) ? values[i] : V(0);
  }
}

// The same by ranks, for n values; `at` is the position of the first one in the ranks.
template <class V>
void keep_ranked(const SumsArgs& args, int k, int64_t at, int n, const V* values, V* kept) {
  const int32_t* ranks = args.ranks + k * args.rank_stride + at;
  for (int i = 0; i < n; ++i) {
    if (args.chances == nullptr) {
      kept[i] = ranks[i] >= args.lo[k] && ranks[i] <= args.last[k] ? values[i] : V(0);
      continue;
    }
    const auto index = static_cast<uint32_t>(args.start + at + i);
    const uint32_t hash = mask_hash(index, static_cast<uint32_t>(args.seeds[2 * k]),
                                    static_cast<uint32_t>(args.seeds[2 * k + 1]));
    const V drawn = static_cast<V>(hash >> 8) * static_cast<V>(0x1p-24);
    const V spread = static_cast<V>(args.chances[2 * k + 1]);
    const V p = static_cast<V>(args.chances[2 * k]) + static_cast<V>(ranks[i]) * spread;
    kept[i] = drawn < p ? values[i] : V(0);
  }
  for (int i = n; i < kSumChunk; ++i) kept[i] = 0;
}

int64_t rows_of(const SumsArgs& args) { return sums_shape(args.kind, args.num_models).rows; }

// Workspace of one thread: a chunk of every input, one more, and room for conversions.
template <class V>
struct ChunkRoom {
  V* values;  // [models][kSumChunk]
  V* base;
  V* more;
  char* raw;
  char* scratch;
  double* found;  // [rows]
  double* total;  // [rows]

  V* model(int k) const { return values + static_cast<int64_t>(k) * kSumChunk; }

  bool take(const SumsArgs& args) {
    const int64_t models = args.num_models, rows = rows_of(args);
    const int64_t chunk = kSumChunk * static_cast<int64_t>(sizeof(V));
    const int64_t bytes = (models + 2) * chunk + 2 * kSumChunk * 8 + 2 * rows * 8;
    char* memory = static_cast<char*>(thread_workspace(bytes));
    if (memory == nullptr) return false;
    values = reinterpret_cast<V*>(memory);
    base = values + models * kSumChunk;
    more = base + kSumChunk;
    raw = reinterpret_cast<char*>(more + kSumChunk);
    scratch = raw + kSumChunk * 8;
    found = reinterpret_cast<double*>(scratch + kSumChunk * 8);
    total = found + rows;
    return true;
  }
};

// One function for each kind in sums.def, name##_sums: writes to room.found the sums of the n <=
// kSumChunk elements from `at` on, which room.values holds.

// The magnitudes of each task vector, and of the part that a sparse merge keeps.
template <class V>
void sparse_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t at, int n) {
  for (int k = 0; k < args.num_models; ++k) {
    if (args.ranks != nullptr) {
      keep_ranked(args, k, at, n, room.model(k), room.more);
    } else {
      keep_sparse(args, k, args.start + at, room.model(k), room.more);
    }
    room.found[2 * k] = sum_in_lanes(room.model(k));
    room.found[2 * k + 1] = sum_in_lanes(room.more);
  }
}

template <class V>
void gram_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int) {
  gram_in_lanes(room.values, args.num_models, room.found);
}

template <class V>
void pcb_extremes_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int n) {
  if constexpr (sizeof(V) == 4) pcb_chunk(args, room.values, n, room.more, room.found);
}

template <class V>
void pcb_exp_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int n) {
  if constexpr (sizeof(V) == 4) pcb_chunk(args, room.values, n, room.more, room.found);
}

// The last of the models is the gradient.
template <class V>
void dots_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int) {
  const int deltas = args.num_models - 1;
  dots_in_lanes(room.model(deltas), room.values, deltas, room.found);
}

template <class V>
void statistics_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int n) {
  for (int k = 0; k < args.num_models; ++k) {
    extremes_of(room.model(k), n, room.found + 4 * k);
    norms_in_lanes(room.model(k), room.found + 4 * k + 2);
  }
}

// RAM: how many elements each model changed alone, and how many together with others.
template <class V>
void ram_counts_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int) {
  const V* values = room.values;
  double* found = room.found;
  const V epsilon = static_cast<V>(args.reals[0]);
  for (int k = 0; k < 2 * args.num_models; ++k) found[k] = 0;
  for (int i = 0; i < kSumChunk; ++i) {
    int active = 0;
    for (int k = 0; k < args.num_models; ++k) {
      const V x = values[static_cast<int64_t>(k) * kSumChunk + i];
      active += (x < 0 ? -x : x) > epsilon ? 1 : 0;
    }
    if (active == 0) continue;
    for (int k = 0; k < args.num_models; ++k) {
      const V x = values[static_cast<int64_t>(k) * kSumChunk + i];
      if ((x < 0 ? -x : x) > epsilon) found[2 * k + (active > 1 ? 1 : 0)] += 1;
    }
  }
}

// EMR: |tau_t|, and the part of the unified vector that its mask keeps.
template <class V>
void emr_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int) {
  const V* values = room.values;
  const int task = static_cast<int>(args.reals[0]);
  for (int i = 0; i < kSumChunk; ++i) {
    V sum = 0, largest = 0;
    for (int k = 0; k < args.num_models; ++k) {
      sum = sum + values[static_cast<int64_t>(k) * kSumChunk + i];
    }
    for (int k = 0; k < args.num_models; ++k) {
      const V x = values[static_cast<int64_t>(k) * kSumChunk + i];
      const V aligned = sum > 0 ? x : -x;
      largest = aligned > largest ? aligned : largest;
    }
    const V own = values[static_cast<int64_t>(task) * kSumChunk + i];
    const bool agrees = sum > 0 ? own > 0 : own < 0;
    room.more[i] = agrees ? largest : V(0);
  }
  room.found[0] = sum_in_lanes(room.model(task));
  room.found[1] = sum_in_lanes(room.more);
}

// SCE: squares of each task vector where the models differ most.
template <class V>
void sce_sums(const SumsArgs& args, ChunkRoom<V>& room, int64_t, int) {
  const V* values = room.values;
  const int count = args.num_models;
  const V many = static_cast<V>(count);
  constexpr int64_t largest = KeyOf<V>::kLargest;
  bool chosen[kSumChunk];
  for (int i = 0; i < kSumChunk; ++i) {
    V sum = 0;
    for (int k = 0; k < count; ++k) sum = sum + values[static_cast<int64_t>(k) * kSumChunk + i];
    const V mean = sum / many;
    V squares = 0;
    for (int k = 0; k < count; ++k) {
      const V apart = values[static_cast<int64_t>(k) * kSumChunk + i] - mean;
      squares = squares + apart * apart;
    }
    chosen[i] = args.lo[0] <= largest && scalar_key(squares / many) >= args.lo[0];
  }
  for (int k = 0; k < count; ++k) {
    const V* own = room.model(k);
    for (int i = 0; i < kSumChunk; ++i) room.more[i] = chosen[i] ? own[i] : V(0);
    room.found[k] = dot_in_lanes(room.more, room.more);
  }
}

// Prefetches the chunk after the one at `at`: adding up a chunk takes too many instructions for the
// processor to look that far ahead.
PM_INLINE void prefetch_chunk(const Operand& operand, int64_t at) {
  const int bytes = dtype_bytes(operand.dtype);
  const char* next = static_cast<const char*>(operand.data) + (at + kSumChunk) * bytes;
  for (int line = 0; line < kSumChunk * bytes; line += kLine) __builtin_prefetch(next + line);
}

// Writes the sums of the n <= kSumChunk elements from `at` on to room.found.
template <class V>
void sum_chunk(const SumsArgs& args, ChunkRoom<V>& room, int64_t at, int n) {
  const int count = args.num_models;
  const bool has_base = args.base.data != nullptr;
  // The gradient is not a model.
  const int deltas = args.kind == SumsKind::kDots ? count - 1 : count;
  if (has_base) {
    widen_part(args.base, at, n, kSumChunk, room.base, room.raw, room.scratch);
    prefetch_chunk(args.base, at);
  }
  for (int k = 0; k < count; ++k) {
    const V* minus = has_base && k < deltas ? room.base : nullptr;
    widen_part(args.models[k], at, n, kSumChunk, room.model(k), room.raw, room.scratch, minus);
    prefetch_chunk(args.models[k], at);
  }
  switch (args.kind) {
#define PM_SUMS(kind, name, rows, reals, inputs) \
  case SumsKind::kind:                           \
    return name##_sums(args, room, at, n);
#include "sums.def"
  }
}

// Whether a row of partials holds smallest (-1) or largest (1) values, which are not added up.
int extreme_of(SumsKind kind, int64_t row) {
  if (kind == SumsKind::kPcbExtremes) return row % 2 == 0 ? -1 : 1;
  if (kind == SumsKind::kStatistics && row % 4 < 2) return row % 4 == 0 ? -1 : 1;
  return 0;
}

struct SumsContext {
  const SumsArgs* args;
  int32_t failed;
};

template <class V>
bool sums_of(const SumsArgs& args, int64_t first, int64_t last) {
  ChunkRoom<V> room;
  if (!room.take(args)) return false;
  const int64_t rows = rows_of(args);
  const int64_t length = args.columns > 0 ? args.columns : kSumChunk;
  for (int64_t c = first; c < last; ++c) {
    const int64_t begin = c * length;
    const int64_t end = begin + length < args.numel ? begin + length : args.numel;
    for (int64_t at = begin; at < end; at += kSumChunk) {
      sum_chunk(args, room, at, static_cast<int>(end - at < kSumChunk ? end - at : kSumChunk));
      for (int64_t row = 0; row < rows; ++row) {
        const double value = room.found[row];
        double& total = room.total[row];
        const int extreme = at == begin ? 0 : extreme_of(args.kind, row);
        if (at == begin) {
          total = value;
        } else if (extreme == 0) {
          total = total + value;
        } else {
          total = (extreme < 0 ? value < total : value > total) ? value : total;
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      args.partials[row * args.num_chunks + c] = room.total[row];
    }
  }
  return true;
}

void sums_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<SumsContext*>(opaque);
  const bool done = context.args->compute == Dtype::kF64
                        ? sums_of<double>(*context.args, first, last)
                        : sums_of<float>(*context.args, first, last);
  if (!done) set_flag(&context.failed);
}

Status chunk_sums(const SumsArgs* args) {
  if (!known(args->kind)) return Status::kUnknownKind;
  const SumsShape shape = sums_shape(args->kind, args->num_models);
  const int64_t length = args->columns > 0 ? args->columns : kSumChunk;
  if (args->num_models < 1 || args->numel < 0 || args->columns < 0 || shape.rows < 1 ||
      args->num_reals != shape.reals || args->num_chunks != (args->numel + length - 1) / length ||
      (args->columns > 0 && args->numel % args->columns != 0) ||
      (shape.inputs != SumsInputs::kAny && args->base.data == nullptr) ||
      (shape.inputs == SumsInputs::kFloatDeltas && args->compute == Dtype::kF64)) {
    return Status::kBadArgument;
  }
  const int64_t last = args->start + args->numel - 1;
  if (args->seeds != nullptr && args->numel > 0 && last >> 32 != args->start >> 32) {
    return Status::kBadArgument;
  }
  if (args->ranks != nullptr && args->rank_stride < args->numel) return Status::kBadArgument;
  SumsContext context{args, 0};
  const int64_t grain = length >= kGrain ? 1 : kGrain / length;
  parallel_ranges(args->num_chunks, grain, args->execution.num_threads, sums_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
