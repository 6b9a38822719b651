// Trimmed task vectors stored as bit masks and values (AdaMerging++): their weighted sum, and their
// dot products with a gradient. Gives the same bits as dense task vectors with zeros.
#pragma once

#include "cpu/elementwise.h"
#include "cpu/sum_lanes.h"

namespace pymerge {
namespace {

constexpr int kMaskWords = kSumChunk / 32;

// Room for one chunk of base, gradient or sum, and the values of one model.
template <class V>
struct PackedRoom {
  V* base;
  V* other;
  V* values;
  char* raw;
  char* scratch;

  bool take() {
    constexpr int64_t chunk = kSumChunk * static_cast<int64_t>(sizeof(double));
    char* memory = static_cast<char*>(thread_workspace(5 * chunk));
    if (memory == nullptr) return false;
    base = reinterpret_cast<V*>(memory);
    other = reinterpret_cast<V*>(memory + chunk);
    values = reinterpret_cast<V*>(memory + 2 * chunk);
    raw = memory + 3 * chunk;
    scratch = memory + 4 * chunk;
    return true;
  }
};

// Calls visit(element of the chunk, value) for every element of chunk c that model k keeps.
template <class V, class Visit>
PM_INLINE void visit_kept(const PackedArgs& args, int k, int64_t c, PackedRoom<V>& room,
                          Visit visit) {
  const int64_t first = args.offsets[k][c];
  const int kept = static_cast<int>(args.offsets[k][c + 1] - first);
  const int padded = (kept + kStep - 1) / kStep * kStep;
  widen_part(args.models[k], first, kept, padded, room.values, room.raw, room.scratch);
  const int64_t all = (args.numel + 31) / 32;
  const int64_t begin = c * kMaskWords;
  const int64_t end = begin + kMaskWords < all ? begin + kMaskWords : all;
  const V* value = room.values;
  for (int64_t word = begin; word < end; ++word) {
    uint32_t bits = args.masks[k][word];
    const int origin = static_cast<int>(word - begin) * 32;
    while (bits != 0) {
      visit(origin + __builtin_ctz(bits), *value++);
      bits &= bits - 1;
    }
  }
}

template <class V>
void packed_sum_chunk(const PackedArgs& args, PackedRoom<V>& room, int64_t c, int n) {
  const int64_t at = c * kSumChunk;
  const int padded = (n + kStep - 1) / kStep * kStep;
  widen_part(args.base, at, n, padded, room.base, room.raw, room.scratch);
  V* const sum = room.other;
  const V* const base = room.base;
  for (int i = 0; i < padded; ++i) sum[i] = 0;
  for (int k = 0; k < args.num_models; ++k) {
    const V weight = static_cast<V>(args.weights[k]);
    visit_kept(args, k, c, room, [&](int i, V value) __attribute__((always_inline)) {
      sum[i] += weight * (value - base[i]);
    });
  }
  for (int i = 0; i < padded; ++i) sum[i] = base[i] + sum[i];
  if constexpr (sizeof(V) == 8) {
    narrow(sum, padded, args.out.dtype, room.raw, reinterpret_cast<float*>(room.scratch));
  } else {
    narrow(sum, padded, args.out.dtype, room.raw);
  }
  const int bytes = dtype_bytes(args.out.dtype);
  std::memcpy(static_cast<char*>(args.out.data) + at * bytes, room.raw,
              static_cast<size_t>(n) * bytes);
}

template <class V>
void packed_dots_chunk(const PackedArgs& args, PackedRoom<V>& room, int64_t c, int n) {
  const int64_t at = c * kSumChunk;
  const int padded = (n + kStep - 1) / kStep * kStep;
  widen_part(args.base, at, n, padded, room.base, room.raw, room.scratch);
  widen_part(args.gradient, at, n, padded, room.other, room.raw, room.scratch);
  const V* const base = room.base;
  const V* const gradient = room.other;
  for (int k = 0; k < args.num_models; ++k) {
    double lanes[kSumLanes] = {};
    visit_kept(args, k, c, room, [&](int i, V value) __attribute__((always_inline)) {
      const V delta = value - base[i];
      lanes[i % kSumLanes] += static_cast<double>(gradient[i]) * static_cast<double>(delta);
    });
    double total = 0;
    for (double lane : lanes) total += lane;
    args.partials[k * args.num_chunks + c] = total;
  }
}

struct PackedContext {
  const PackedArgs* args;
  int32_t failed;
};

template <class V>
bool packed_of(const PackedArgs& args, int64_t first, int64_t last) {
  PackedRoom<V> room;
  if (!room.take()) return false;
  for (int64_t c = first; c < last; ++c) {
    const int64_t left = args.numel - c * kSumChunk;
    const int n = static_cast<int>(left < kSumChunk ? left : kSumChunk);
    if (args.partials != nullptr) {
      packed_dots_chunk(args, room, c, n);
    } else {
      packed_sum_chunk(args, room, c, n);
    }
  }
  return true;
}

void packed_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<PackedContext*>(opaque);
  const bool done = context.args->compute == Dtype::kF64
                        ? packed_of<double>(*context.args, first, last)
                        : packed_of<float>(*context.args, first, last);
  if (!done) set_flag(&context.failed);
}

Status packed(const PackedArgs* args) {
  if (args->num_models < 1 || args->numel < 0 ||
      args->num_chunks != (args->numel + kSumChunk - 1) / kSumChunk ||
      (args->partials == nullptr) == (args->out.data == nullptr)) {
    return Status::kBadArgument;
  }
  PackedContext context{args, 0};
  parallel_ranges(args->num_chunks, kGrain / kSumChunk, args->execution.num_threads, packed_range,
                  &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
