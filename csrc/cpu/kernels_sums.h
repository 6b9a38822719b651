// Sums over chunks of kSumChunk elements, in doubles and in one order everywhere: element i of a
// chunk goes to lane i mod 16, each lane adds up in order, then the lanes, 0 to 15. What is added
// is exact or rounded once: products of two floats fit a double.
#pragma once

#include "cpu/elementwise.h"
#include "math/pcb.h"
#include "math/sparse.h"

namespace pymerge {
namespace {

constexpr int kSumLanes = 16;

template <class V>
double sum_in_lanes(const V* values) {
  double lanes[kSumLanes] = {};
  for (int i = 0; i < kSumChunk; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) {
      const double value = values[i + j];
      lanes[j] += value < 0 ? -value : value;
    }
  }
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

template <class V>
double dot_in_lanes(const V* a, const V* b) {
  double lanes[kSumLanes] = {};
  for (int i = 0; i < kSumChunk; i += kSumLanes) {
    for (int j = 0; j < kSumLanes; ++j) {
      lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

// n elements -> V, zeros up to kSumChunk. `raw` and `scratch` hold a chunk of 8-byte elements.
template <class V>
void widen_chunk(const Operand& operand, int64_t at, int n, V* to, char* raw, char* scratch) {
  const int bytes = dtype_bytes(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + at * bytes;
  if (n < kSumChunk) {
    std::memset(raw, 0, static_cast<size_t>(kSumChunk) * bytes);
    std::memcpy(raw, from, static_cast<size_t>(n) * bytes);
    from = raw;
  }
  if constexpr (sizeof(V) == 8) {
    widen(operand.dtype, from, kSumChunk, to, reinterpret_cast<float*>(scratch));
  } else {
    widen(operand.dtype, from, kSumChunk, to);
  }
}

template <class V>
struct IntegerOf {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

// Keeps of `values` what model k of a sparse merge keeps.
template <class V>
void keep_sparse(const SumsArgs& args, int k, int64_t index, const V* values, V* kept) {
  using Int = typename IntegerOf<V>::Type;
  constexpr int64_t largest = sizeof(V) == 8 ? INT64_MAX : INT32_MAX;
  const bool nothing = args.lo[k] > largest;
  const Int lo = static_cast<Int>(nothing ? largest : args.lo[k]);
  const Int last = static_cast<Int>(args.last[k] > largest ? largest : args.last[k]);
  const bool drawn = args.seeds != nullptr;
  const auto first = drawn ? static_cast<uint32_t>(args.seeds[2 * k]) : 0u;
  const auto second = drawn ? static_cast<uint32_t>(args.seeds[2 * k + 1]) : 0u;
  const auto limit = drawn ? static_cast<uint32_t>(args.limits[k]) : UINT32_MAX;
  const auto start = static_cast<uint32_t>(index);
  for (int i = 0; i < kSumChunk; ++i) {
    Int key;
    std::memcpy(&key, values + i, sizeof(V));
    key &= static_cast<Int>(largest);
    const bool in_band = (key >= lo) & (key <= last) & !nothing;
    const uint32_t hash = mask_hash(start + static_cast<uint32_t>(i), first, second);
    kept[i] = in_band & (hash <= limit) ? values[i] : V(0);
  }
}

// Products of all pairs, of n elements: extremes, or sums of exp of the scaled products.
inline void pcb_chunk(const SumsArgs& args, const float* values, int n, float* room, int64_t c) {
  const int count = args.num_models;
  const int pairs = count * (count + 1) / 2;
  PcbCall call{};
  call.num_models = count;
  call.pair_min = args.reals;
  call.pair_inv = args.reals + pairs;
  int row = 0;
  for (int i = 0; i < count; ++i) {
    for (int j = i; j < count; ++j, ++row) {
      const float* a = values + static_cast<int64_t>(i) * kSumChunk;
      const float* b = values + static_cast<int64_t>(j) * kSumChunk;
      if (args.kind == SumsKind::kPcbExtremes) {
        // NaN and infinity are left out: they must not spoil what is finite.
        float least = __builtin_inff(), most = -__builtin_inff();
        for (int e = 0; e < n; ++e) {
          const float product = a[e] * b[e];
          const bool finite = product - product == 0;
          least = finite && product < least ? product : least;
          most = finite && product > most ? product : most;
        }
        args.partials[2 * row * args.num_chunks + c] = least + 0.0;  // no -0, which has no order
        args.partials[(2 * row + 1) * args.num_chunks + c] = most + 0.0;
        continue;
      }
      for (int again = 0; again <= (i == j ? 1 : 0); ++again) {
        const F many = F{} + (again == 1 ? static_cast<float>(count) : 1.0f);
        for (int e = 0; e < kSumChunk; e += kLanes) {
          const F product = (F)load_bits(a + e) * (F)load_bits(b + e);
          const F x = (product - (F{} + call.pair_min[row])) * (F{} + call.pair_inv[row]);
          const F value = exp32(many * x);
          store_bits(room + e, (U)(value == value ? value : F{}));
        }
        for (int e = n; e < kSumChunk; ++e) room[e] = 0;
        const int64_t to = again == 1 ? pairs + i : row;
        args.partials[to * args.num_chunks + c] = sum_in_lanes(room);
      }
    }
  }
}

struct SumsContext {
  const SumsArgs* args;
  int32_t failed;
};

template <class V>
bool sums_of(const SumsArgs& args, int64_t first, int64_t last) {
  const int64_t models = args.num_models;
  const int64_t chunk = kSumChunk * static_cast<int64_t>(sizeof(V));
  char* memory = static_cast<char*>(thread_workspace((models + 2) * chunk + 2 * kSumChunk * 8));
  if (memory == nullptr) return false;
  V* values = reinterpret_cast<V*>(memory);
  V* base = values + models * kSumChunk;
  V* kept = base + kSumChunk;
  char* raw = reinterpret_cast<char*>(kept + kSumChunk);
  char* scratch = raw + kSumChunk * 8;
  for (int64_t c = first; c < last; ++c) {
    const int64_t at = c * kSumChunk;
    const int n = static_cast<int>(args.numel - at < kSumChunk ? args.numel - at : kSumChunk);
    if (args.base.data != nullptr) widen_chunk(args.base, at, n, base, raw, scratch);
    for (int64_t k = 0; k < models; ++k) {
      V* own = values + k * kSumChunk;
      widen_chunk(args.models[k], at, n, own, raw, scratch);
      for (int i = 0; i < kSumChunk && args.base.data != nullptr; ++i) own[i] = own[i] - base[i];
    }
    if constexpr (sizeof(V) == 4) {
      if (args.kind >= SumsKind::kPcbExtremes) {
        pcb_chunk(args, values, n, kept, c);
        continue;
      }
    }
    int64_t row = 0;
    for (int64_t k = 0; k < models; ++k) {
      const V* own = values + k * kSumChunk;
      if (args.kind == SumsKind::kSparse) {
        keep_sparse(args, static_cast<int>(k), args.start + at, own, kept);
        args.partials[row++ * args.num_chunks + c] = sum_in_lanes(own);
        args.partials[row++ * args.num_chunks + c] = sum_in_lanes(kept);
      } else {
        for (int64_t j = k; j < models; ++j) {
          args.partials[row++ * args.num_chunks + c] = dot_in_lanes(own, values + j * kSumChunk);
        }
      }
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
  const int64_t chunks = (args->numel + kSumChunk - 1) / kSumChunk;
  if (args->num_models < 1 || args->numel < 0 || args->num_chunks != chunks ||
      (args->kind != SumsKind::kGram && args->base.data == nullptr) ||
      (args->kind == SumsKind::kPcbExp && args->reals == nullptr) ||
      (args->kind >= SumsKind::kPcbExtremes && args->compute == Dtype::kF64)) {
    return Status::kBadArgument;
  }
  const int64_t last = args->start + args->numel - 1;
  if (args->seeds != nullptr && args->numel > 0 && last >> 32 != args->start >> 32) {
    return Status::kBadArgument;
  }
  SumsContext context{args, 0};
  parallel_ranges(chunks, kGrain / kSumChunk, args->execution.num_threads, sums_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
