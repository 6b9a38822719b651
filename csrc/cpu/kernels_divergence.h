// Divergences of rows (csrc/math/divergence.h).
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

// Converts elements of an operand to doubles by way of V, the type that deltas are computed in.
template <class V>
struct Doubles {
  V* widened;
  char* raw;
  char* scratch;

  // n elements, and zeros up to a whole step of all lanes.
  void load(const Operand& operand, int64_t at, int n, double* to) const {
    constexpr int kWhole = 32;  // a multiple of kStep and of kRowLanes
    const char* from = static_cast<const char*>(operand.data) + at * dtype_bytes(operand.dtype);
    const int whole = n / kDLanes * kDLanes;
    int done = 0;
    if (sizeof(V) == 4 && operand.dtype == Dtype::kBF16) {
      for (; done < whole; done += kDLanes) {
        uint16_t halves __attribute__((vector_size(2 * kDLanes)));
        std::memcpy(&halves, from + 2 * done, sizeof(halves));
        using Words = uint32_t __attribute__((vector_size(4 * kDLanes)));
        using Floats = float __attribute__((vector_size(4 * kDLanes)));
        const Floats floats = (Floats)(__builtin_convertvector(halves, Words) << 16);
        store_bits(to + done, (U) __builtin_convertvector(floats, D));
      }
    } else if (sizeof(V) == 4 && operand.dtype == Dtype::kF32) {
      for (; done < whole; done += kDLanes) {
        float floats __attribute__((vector_size(4 * kDLanes)));
        std::memcpy(&floats, from + 4 * done, sizeof(floats));
        store_bits(to + done, (U) __builtin_convertvector(floats, D));
      }
    }
    const int padded = (n + kWhole - 1) / kWhole * kWhole;
    if (done == padded) return;
    const int rest = (n - done + kWhole - 1) / kWhole * kWhole;
    widen_part(operand, at + done, n - done, rest, widened, raw, scratch);
    for (int i = done; i < padded; ++i) to[i] = i - done < rest ? widened[i - done] : V(0);
  }
};

constexpr int kRowRoom = 1 << 14;  // elements: a row up to this size is held with its exp

// Workspace of one thread: whole rows if they fit, or chunks of one that does not.
template <class V>
struct RowRoom {
  double* x;
  double* y;
  double* x_exp;
  double* y_exp;
  Doubles<V> doubles;

  bool take() {
    constexpr int64_t kBytes = (kRowRoom + kRowLanes) * 8, kChunkBytes = kSumChunk * 8;
    char* memory = static_cast<char*>(thread_workspace(4 * kBytes + 3 * kChunkBytes));
    if (memory == nullptr) return false;
    x = reinterpret_cast<double*>(memory);
    y = reinterpret_cast<double*>(memory + kBytes);
    x_exp = reinterpret_cast<double*>(memory + 2 * kBytes);
    y_exp = reinterpret_cast<double*>(memory + 3 * kBytes);
    memory += 4 * kBytes;
    doubles = {reinterpret_cast<V*>(memory), memory + kChunkBytes, memory + 2 * kChunkBytes};
    return true;
  }
  // n <= kRowRoom elements of both.
  void load(const DivergenceArgs& args, int64_t at, int64_t n) {
    for (int64_t done = 0; done < n; done += kSumChunk) {
      const int part = static_cast<int>(n - done < kSumChunk ? n - done : kSumChunk);
      doubles.load(args.models[0], at + done, part, x + done);
      doubles.load(args.base, at + done, part, y + done);
    }
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

// Calls function(offset, n) with each chunk of n elements.
template <class Function>
PM_INLINE void each_chunk(int64_t length, Function&& function) {
  for (int64_t at = 0; at < length; at += kSumChunk) {
    function(at, static_cast<int>(length - at < kSumChunk ? length - at : kSumChunk));
  }
}

struct Columns {
  double* rows[kDivergenceRows];

  Columns(const DivergenceArgs& args, int64_t c) {
    for (int r = 0; r < kDivergenceRows; ++r) rows[r] = args.table + r * args.num_chunks + c;
  }
  double& operator[](int r) { return *rows[r]; }
  DivergenceRow<D> row() const {
    return divergence_row<D>(D{} + *rows[0], D{} + *rows[1], D{} + *rows[2], D{} + *rows[3]);
  }
};

// One kind of divergence of a row that does not fit: loaded chunk by chunk.
template <class V>
void step_of_long_row(const DivergenceArgs& args, Divergence kind, RowRoom<V>& room, int64_t begin,
                      int64_t length, Columns columns) {
  const D x_max = D{} + columns[0], y_max = D{} + columns[1];
  DivergenceRow<D> row{};
  if (kind == Divergence::kDivergence) row = columns.row();
  double own = 0, other = 0;
  each_chunk(length, [&](int64_t at, int n) {
    room.load(args, begin + at, n);
    const double *x = room.x, *y = room.y;
    if (kind == Divergence::kMaxima) {
      const double largest = largest_of(x, n), largest_base = largest_of(y, n);
      own = at == 0 || largest > own ? largest : own;
      other = at == 0 || largest_base > other ? largest_base : other;
    } else if (kind == Divergence::kExp) {
      own = own + sum_terms(n, [&](int i) { return exp64<D>((D)load_bits(x + i) - x_max); });
      other = other + sum_terms(n, [&](int i) { return exp64<D>((D)load_bits(y + i) - y_max); });
    } else {
      own = own + sum_terms(n, [&](int i) {
              return divergence_point<D>((D)load_bits(x + i), (D)load_bits(y + i), row,
                                         [](L mask) { return any_lane(mask); });
            });
    }
  });
  const DivergenceRows rows = divergence_rows(kind);
  columns[rows.first] = own;
  if (rows.count > 1) columns[rows.first + 1] = other;
}

// The same for a row that is held: its exp are computed once.
template <class V>
void steps_of_row(Divergence kind, const RowRoom<V>& room, int64_t offset, int64_t length,
                  Columns columns) {
  const bool all = kind == Divergence::kAll;
  const double *x = room.x + offset, *y = room.y + offset;
  double *x_exp = room.x_exp + offset, *y_exp = room.y_exp + offset;
  if (all || kind == Divergence::kMaxima) {
    columns[0] = largest_of(x, static_cast<int>(length));
    columns[1] = largest_of(y, static_cast<int>(length));
  }
  if (kind == Divergence::kMaxima) return;
  const D x_max = D{} + columns[0], y_max = D{} + columns[1];
  const auto exps = [&](const double* values, D most, double* to) {
    double total = 0;
    each_chunk(length, [&](int64_t at, int n) {
      total = total + sum_terms(n, [&](int i) {
                const D value = exp64<D>((D)load_bits(values + at + i) - most);
                store_bits(to + at + i, (U)value);
                return value;
              });
    });
    return total;
  };
  const double x_sum = exps(x, x_max, x_exp), y_sum = exps(y, y_max, y_exp);
  if (all || kind == Divergence::kExp) {
    columns[2] = x_sum;
    columns[3] = y_sum;
  }
  if (kind == Divergence::kExp) return;
  const DivergenceRow<D> row = columns.row();
  double total = 0;
  each_chunk(length, [&](int64_t at, int n) {
    total = total + sum_terms(n, [&](int i) {
              const int64_t j = at + i;
              return divergence_term<D>((D)load_bits(x + j) - (D)load_bits(y + j),
                                        (D)load_bits(x_exp + j),
                                        [&] { return (D)load_bits(y_exp + j); }, row,
                                        [](L mask) { return any_lane(mask); });
            });
  });
  columns[4] = total;
}

// The same for up to kDLanes rows of up to kRowLanes elements, one row in each lane of the vectors.
// Such a row is summed in the order of its elements.
template <class V>
void steps_of_short_rows(const DivergenceArgs& args, const RowRoom<V>& room, int64_t offset,
                         int length, int64_t first, int count) {
  const bool all = args.kind == Divergence::kAll;
  const auto across = [&](const double* from, int64_t stride) {
    double lanes[kDLanes];
    for (int r = 0; r < kDLanes; ++r) lanes[r] = from[(r < count ? r : 0) * stride];
    return (D)load_bits(lanes);
  };
  const auto column = [&](int r) { return args.table + r * args.num_chunks + first; };
  const auto put = [&](int row, D values) {
    for (int r = 0; r < count; ++r) column(row)[r] = values[r];
  };
  D x[kRowLanes], y[kRowLanes], x_exp[kRowLanes], y_exp[kRowLanes];
  for (int i = 0; i < length; ++i) {
    x[i] = across(room.x + offset + i, length);
    y[i] = across(room.y + offset + i, length);
  }
  if (all || args.kind == Divergence::kMaxima) {
    D x_most = D{} - __builtin_inf(), y_most = x_most;
    for (int i = 0; i < length; ++i) {
      x_most = x[i] > x_most ? x[i] : x_most;
      y_most = y[i] > y_most ? y[i] : y_most;
    }
    put(0, x_most + 0.0);
    put(1, y_most + 0.0);
  }
  if (args.kind == Divergence::kMaxima) return;
  const D x_max = across(column(0), 1), y_max = across(column(1), 1);
  D x_sum{}, y_sum{};
  for (int i = 0; i < length; ++i) {
    x_exp[i] = exp64<D>(x[i] - x_max);
    y_exp[i] = exp64<D>(y[i] - y_max);
    x_sum = x_sum + x_exp[i];
    y_sum = y_sum + y_exp[i];
  }
  if (all || args.kind == Divergence::kExp) {
    put(2, x_sum);
    put(3, y_sum);
  }
  if (args.kind == Divergence::kExp) return;
  const DivergenceRow<D> row =
      divergence_row<D>(x_max, y_max, across(column(2), 1), across(column(3), 1));
  D total{};
  for (int i = 0; i < length; ++i) {
    total = total + divergence_term<D>(
                        x[i] - y[i], x_exp[i], [&] { return y_exp[i]; }, row,
                        [](L mask) { return any_lane(mask); });
  }
  put(4, total);
}

template <class V>
bool divergences_of(const DivergenceArgs& args, int64_t first, int64_t last) {
  RowRoom<V> room;
  if (!room.take()) return false;
  const int64_t length = args.columns > 0 ? args.columns : kSumChunk;
  if (length > kRowRoom) {
    for (int64_t c = first; c < last; ++c) {
      for (const Divergence step : kDivergenceSteps) {
        if (args.kind != step && args.kind != Divergence::kAll) continue;
        step_of_long_row(args, step, room, c * length, length, Columns(args, c));
      }
    }
    return true;
  }
  // Several rows at a time where they are short.
  const int64_t together = length < kSumChunk ? kSumChunk / length : 1;
  for (int64_t c = first; c < last; c += together) {
    const int64_t stop = c + together < last ? c + together : last;
    const int64_t begin = c * length;
    const int64_t end = stop * length < args.numel ? stop * length : args.numel;
    room.load(args, begin, end - begin);
    for (int64_t row = c; row < stop && length <= kRowLanes; row += kDLanes) {
      const int many = static_cast<int>(stop - row < kDLanes ? stop - row : kDLanes);
      steps_of_short_rows(args, room, (row - c) * length, static_cast<int>(length), row, many);
    }
    for (int64_t row = c; row < stop && length > kRowLanes; ++row) {
      const int64_t at = row * length - begin;
      const int64_t own = end - begin - at < length ? end - begin - at : length;
      steps_of_row(args.kind, room, at, own, Columns(args, row));
    }
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
  if (!known(args->kind)) return Status::kUnknownKind;
  const int64_t length = args->columns > 0 ? args->columns : kSumChunk;
  if (args->num_models != 1 || args->numel < 0 || args->columns < 0 ||
      args->num_chunks != (args->numel + length - 1) / length ||
      (args->columns > 0 && args->numel % args->columns != 0) || args->base.data == nullptr ||
      (args->numel > 0 && args->table == nullptr)) {
    return Status::kBadArgument;
  }
  DivergenceContext context{args, 0};
  const int64_t grain = length >= kGrain ? 1 : kGrain / length;
  parallel_ranges(args->num_chunks, grain, args->execution.num_threads, divergence_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace
}  // namespace pymerge
