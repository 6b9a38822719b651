// Divergences of rows (csrc/math/divergence.h), and what is weighed by them.
#pragma once

#include "cpu/elementwise.h"
#include "math/divergence.h"

namespace pymerge {
namespace {

constexpr int kRowLanes = 16;  // the order of sums: as in kernels_sums.h
constexpr int kRowVectors = kRowLanes / kDLanes;

PM_INLINE bool any_lane(L mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  int64_t all = 0;
  for (int i = 0; i < kDLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Adds up term(i), a vector of doubles from element i on, over n elements.
template <class Term>
PM_INLINE double sum_terms(int n, Term&& term) {
  D lanes[kRowVectors] = {};
  int i = 0;
  for (; i + kRowLanes <= n; i += kRowLanes) {
    for (int v = 0; v < kRowVectors; ++v) lanes[v] = lanes[v] + term(i + v * kDLanes);
  }
  if (i < n) {
    double rest[kRowLanes];
    for (int v = 0; v < kRowVectors; ++v) store_bits(rest + v * kDLanes, (U)term(i + v * kDLanes));
    for (int j = n - i; j < kRowLanes; ++j) rest[j] = 0;
    for (int v = 0; v < kRowVectors; ++v) {
      lanes[v] = lanes[v] + (D)load_bits(rest + v * kDLanes);
    }
  }
  double total = 0;
  for (int j = 0; j < kRowLanes; ++j) total = total + lanes[j / kDLanes][j % kDLanes];
  return total;
}

// A chunk of both inputs in doubles, and what conversions need.
template <class V>
struct RowRoom {
  double* x;
  double* y;
  V* widened;
  char* raw;
  char* scratch;

  bool take() {
    constexpr int64_t kBytes = kSumChunk * 8;
    char* memory = static_cast<char*>(thread_workspace(5 * kBytes));
    if (memory == nullptr) return false;
    x = reinterpret_cast<double*>(memory);
    y = x + kSumChunk;
    widened = reinterpret_cast<V*>(memory + 2 * kBytes);
    raw = memory + 3 * kBytes;
    scratch = memory + 4 * kBytes;
    return true;
  }
  // n elements, and zeros up to a whole step of all lanes.
  void load(const Operand& operand, int64_t at, int n, double* to) {
    constexpr int kWhole = 32;  // a multiple of kStep and of kRowLanes
    const int padded = (n + kWhole - 1) / kWhole * kWhole;
    widen_part(operand, at, n, padded, widened, raw, scratch);
    for (int i = 0; i < padded; ++i) to[i] = widened[i];
  }
};

struct DivergenceContext {
  const DivergenceArgs* args;
  int32_t failed;
};

inline double largest_of(const double* values, int n) {
  D most = D{} - __builtin_inf();
  int i = 0;
  for (; i + kDLanes <= n; i += kDLanes) {
    const D x = (D)load_bits(values + i);
    most = x > most ? x : most;  // NaN is left out
  }
  double found = most[0];
  for (int j = 1; j < kDLanes; ++j) found = most[j] > found ? most[j] : found;
  for (; i < n; ++i) found = values[i] > found ? values[i] : found;
  return found + 0.0;  // no -0, which has no order
}

inline double exp_sum_of(const double* values, int n, double most) {
  const D largest = D{} + most;
  return sum_terms(n, [&](int i) { return exp64<D>((D)load_bits(values + i) - largest); });
}

inline double divergence_of(const double* x, const double* y, int n, const DivergenceRow<D>& row) {
  return sum_terms(n, [&](int i) {
    return divergence_point<D>((D)load_bits(x + i), (D)load_bits(y + i), row,
                               [](L mask) { return any_lane(mask); });
  });
}

template <class V>
bool divergences_of(const DivergenceArgs& args, int64_t first, int64_t last) {
  RowRoom<V> room;
  if (!room.take()) return false;
  const int64_t length = args.columns > 0 ? args.columns : kSumChunk;
  for (int64_t c = first; c < last; ++c) {
    double* rows[kDivergenceRows];
    for (int r = 0; r < kDivergenceRows; ++r) rows[r] = args.table + r * args.num_chunks + c;
    const double x_max = *rows[0], y_max = *rows[1];
    DivergenceRow<D> row{};
    if (args.kind == Divergence::kDivergence) {
      row = divergence_row<D>(D{} + x_max, D{} + y_max, D{} + *rows[2], D{} + *rows[3]);
    }
    const int64_t begin = c * length;
    const int64_t end = begin + length < args.numel ? begin + length : args.numel;
    double own = 0, other = 0;
    for (int64_t at = begin; at < end; at += kSumChunk) {
      const int n = static_cast<int>(end - at < kSumChunk ? end - at : kSumChunk);
      room.load(args.models[0], at, n, room.x);
      room.load(args.base, at, n, room.y);
      if (args.kind == Divergence::kMaxima) {
        const double x = largest_of(room.x, n), y = largest_of(room.y, n);
        own = at == begin || x > own ? x : own;
        other = at == begin || y > other ? y : other;
      } else if (args.kind == Divergence::kExp) {
        own = own + exp_sum_of(room.x, n, x_max);
        other = other + exp_sum_of(room.y, n, y_max);
      } else {
        own = own + divergence_of(room.x, room.y, n, row);
      }
    }
    const int to = 2 * static_cast<int>(args.kind);
    *rows[to] = own;
    if (args.kind != Divergence::kDivergence) *rows[to + 1] = other;
  }
  return true;
}

void divergence_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<DivergenceContext*>(opaque);
  const bool done = context.args->compute == Dtype::kF64
                        ? divergences_of<double>(*context.args, first, last)
                        : divergences_of<float>(*context.args, first, last);
  if (!done) set_flag(&context.failed);
}

Status divergence_sums(const DivergenceArgs* args) {
  const int64_t length = args->columns > 0 ? args->columns : kSumChunk;
  if (args->num_models != 1 || args->numel < 0 || args->columns < 0 ||
      args->num_chunks != (args->numel + length - 1) / length ||
      (args->columns > 0 && args->numel % args->columns != 0) || args->base.data == nullptr ||
      (args->numel > 0 && args->table == nullptr) || args->kind < Divergence::kMaxima ||
      args->kind > Divergence::kDivergence) {
    return Status::kBadArgument;
  }
  DivergenceContext context{args, 0};
  const int64_t grain = length >= kGrain ? 1 : kGrain / length;
  parallel_ranges(args->num_chunks, grain, args->execution.num_threads, divergence_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

struct ImportanceContext {
  const ImportanceArgs* args;
  int32_t failed, nonfinite;
};

template <class V>
bool importances_of(const ImportanceArgs& args, int64_t begin, int64_t end, bool* nonfinite) {
  using Key = typename KeyOf<V>::Type;
  char* memory = static_cast<char*>(thread_workspace(6 * kBlock * 8));
  if (memory == nullptr) return false;
  V* base = reinterpret_cast<V*>(memory);
  V* own = base + kBlock;
  V* result = own + kBlock;
  char* raw = reinterpret_cast<char*>(result + kBlock);
  char* scratch = raw + kBlock * 8;
  double* weights = reinterpret_cast<double*>(scratch + kBlock * 8);
  const V threshold = static_cast<V>(args.threshold);
  int64_t row = begin / args.columns, left = args.columns - begin % args.columns;
  Key worst = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const int padded = (n + kStep - 1) / kStep * kStep;
    widen_part(args.base, at, n, padded, base, raw, scratch);
    widen_part(args.models[0], at, n, padded, own, raw, scratch);
    for (int done = 0; done < n;) {
      const int here = left < n - done ? static_cast<int>(left) : n - done;
      for (int i = 0; i < here; ++i) weights[done + i] = args.divergences[row];
      done += here;
      left -= here;
      if (left == 0) {
        ++row;
        left = args.columns;
      }
    }
    for (int i = n; i < padded; ++i) weights[i] = 0;
    for (int i = 0; i < padded; ++i) {
      const V delta = own[i] - base[i];
      const V size = sizeof(V) == 8 ? static_cast<V>(__builtin_fabs(delta))
                                    : static_cast<V>(__builtin_fabsf(static_cast<float>(delta)));
      result[i] = static_cast<V>(static_cast<double>(size) * weights[i]);
    }
    if (args.merge != 0) {
      for (int i = 0; i < padded; ++i) {
        const V moved = base[i] + (own[i] - base[i]);
        result[i] = result[i] >= threshold ? moved : base[i];
      }
    }
    for (int i = 0; i < padded; ++i) {
      const Key first = scalar_key(base[i]), second = scalar_key(own[i]);
      const Key larger = first > second ? first : second;
      worst = larger > worst ? larger : worst;
    }
    if constexpr (sizeof(V) == 8) {
      narrow(result, padded, args.out.dtype, raw, reinterpret_cast<float*>(scratch));
    } else {
      narrow(result, padded, args.out.dtype, raw);
    }
    const int bytes = dtype_bytes(args.out.dtype);
    std::memcpy(static_cast<char*>(args.out.data) + at * bytes, raw,
                static_cast<size_t>(n) * bytes);
  }
  *nonfinite = worst >= KeyOf<V>::kInfinity;
  return true;
}

void importance_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<ImportanceContext*>(opaque);
  bool nonfinite = false;
  const bool done = context.args->compute == Dtype::kF64
                        ? importances_of<double>(*context.args, begin, end, &nonfinite)
                        : importances_of<float>(*context.args, begin, end, &nonfinite);
  if (!done) set_flag(&context.failed);
  if (nonfinite) set_flag(&context.nonfinite);
}

Status row_importance(const ImportanceArgs* args) {
  if (args->num_models != 1 || args->numel < 0 || args->columns < 1 ||
      args->numel % args->columns != 0 || args->base.data == nullptr || args->out.data == nullptr) {
    return Status::kBadArgument;
  }
  ImportanceContext context{args, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, importance_range, &context);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
