// Ranks within rows, and sums with weights of their own for each row.
#pragma once

#include "cpu/kernels_weighted_sum.h"

namespace pymerge {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kShortRow = 64;  // elements up to which insertion beats counting

// Sorts the indices of a row by key, equal keys by index: least significant digits first.
template <class Key>
struct RowSorter {
  // Keys are not negative: a bit less.
  static constexpr int kPasses = (8 * static_cast<int>(sizeof(Key)) - 2) / kDigitBits + 1;

  Key* keys;        // [columns]
  int32_t* order;   // [columns]
  int32_t* other;   // [columns]
  int32_t* digits;  // [kPasses][kDigits]

  static int64_t bytes(int64_t columns) {
    return columns * static_cast<int64_t>(sizeof(Key) + 2 * sizeof(int32_t)) +
           kPasses * kDigits * static_cast<int64_t>(sizeof(int32_t)) + 64;
  }

  RowSorter(void* memory, int64_t columns)
      : keys(static_cast<Key*>(memory)),
        order(reinterpret_cast<int32_t*>(keys + columns)),
        other(order + columns),
        digits(other + columns) {}

  void rank(int64_t columns, int32_t* ranks) {
    const int32_t n = static_cast<int32_t>(columns);
    if (n <= kShortRow) {
      insert(n);
    } else {
      count(n);
    }
    for (int32_t i = 0; i < n; ++i) ranks[order[i]] = i;
  }

  void insert(int32_t n) {
    for (int32_t i = 0; i < n; ++i) {
      const Key key = keys[i];
      int32_t at = i;
      for (; at > 0 && keys[order[at - 1]] > key; --at) order[at] = order[at - 1];
      order[at] = i;
    }
  }

  void count(int32_t n) {
    std::memset(digits, 0, sizeof(int32_t) * kPasses * kDigits);
    for (int32_t i = 0; i < n; ++i) {
      for (int pass = 0; pass < kPasses; ++pass) {
        ++digits[pass * kDigits + static_cast<int>(keys[i] >> (pass * kDigitBits) & (kDigits - 1))];
      }
    }
    for (int32_t i = 0; i < n; ++i) order[i] = i;
    for (int pass = 0; pass < kPasses; ++pass) {
      int32_t* at = digits + pass * kDigits;
      const int shift = pass * kDigitBits;
      // Where all keys share the digit, there is nothing to move.
      if (at[static_cast<int>(keys[0] >> shift & (kDigits - 1))] == n) continue;
      int32_t sum = 0;
      for (int digit = 0; digit < kDigits; ++digit) {
        const int32_t many = at[digit];
        at[digit] = sum;
        sum += many;
      }
      for (int32_t i = 0; i < n; ++i) {
        const int32_t index = order[i];
        other[at[static_cast<int>(keys[index] >> shift & (kDigits - 1))]++] = index;
      }
      int32_t* sorted = other;
      other = order;
      order = sorted;
    }
  }
};

struct RanksContext {
  const RanksArgs* args;
  int32_t failed;
};

template <class V>
bool rank_rows(const RanksArgs& args, int64_t first, int64_t last) {
  using Key = typename KeyOf<V>::Type;
  const int64_t columns = args.columns, rows = args.numel / columns;
  // Blocks of both inputs, a padded copy and room for conversions through fp32.
  constexpr int64_t kRoom = 4 * kBlock * 8;
  char* memory = static_cast<char*>(thread_workspace(kRoom + RowSorter<Key>::bytes(columns)));
  if (memory == nullptr) return false;
  V* base = reinterpret_cast<V*>(memory);
  V* model = base + kBlock;
  char* raw = reinterpret_cast<char*>(model + kBlock);
  char* scratch = raw + kBlock * 8;
  RowSorter<Key> sorter(memory + kRoom, columns);
  for (int64_t item = first; item < last; ++item) {
    const int64_t k = item / rows, row = item % rows;
    for (int64_t at = 0; at < columns; at += kBlock) {
      const int n = static_cast<int>(columns - at < kBlock ? columns - at : kBlock);
      const int padded = (n + kStep - 1) / kStep * kStep;
      widen_part(args.base, row * columns + at, n, padded, base, raw, scratch);
      widen_part(args.models[k], row * columns + at, n, padded, model, raw, scratch);
      for (int i = 0; i < n; ++i) sorter.keys[at + i] = scalar_key(model[i] - base[i]);
    }
    sorter.rank(columns, args.ranks + k * args.stride + row * columns);
  }
  return true;
}

void ranks_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<RanksContext*>(opaque);
  const bool done = context.args->compute == Dtype::kF64
                        ? rank_rows<double>(*context.args, first, last)
                        : rank_rows<float>(*context.args, first, last);
  if (!done) set_flag(&context.failed);
}

Status row_ranks(const RanksArgs* args) {
  const int64_t columns = args->columns;
  if (args->num_models < 1 || args->numel < 0 || columns < 1 || columns > INT32_MAX ||
      args->numel % columns != 0 || args->stride < args->numel || args->base.data == nullptr) {
    return Status::kBadArgument;
  }
  RanksContext context{args, 0};
  const int64_t grain = columns >= kGrain ? 1 : kGrain / columns;
  parallel_ranges(args->num_models * (args->numel / columns), grain, args->execution.num_threads,
                  ranks_range, &context);
  return context.failed ? Status::kOutOfMemory : Status::kOk;
}

// out = sum_k w_kr x_k, or base + sum_k w_kr (x_k - base), in row r.
struct RowSumContext {
  const RowSumArgs* args;
  int32_t failed, nonfinite;
};

template <class V>
bool sum_rows(const RowSumArgs& args, int64_t first, int64_t last, bool* nonfinite) {
  using Key = typename KeyOf<V>::Type;
  const int64_t columns = args.columns, rows = args.numel / columns, models = args.num_models;
  char* memory = static_cast<char*>(thread_workspace(5 * kBlock * 8));
  if (memory == nullptr) return false;
  V* base = reinterpret_cast<V*>(memory);
  V* own = base + kBlock;
  V* sum = own + kBlock;
  char* raw = reinterpret_cast<char*>(sum + kBlock);
  char* scratch = raw + kBlock * 8;
  const bool has_base = args.base.data != nullptr;
  Key worst = 0;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t offset = 0; offset < columns; offset += kBlock) {
      const int n = static_cast<int>(columns - offset < kBlock ? columns - offset : kBlock);
      const int64_t at = row * columns + offset;
      const int padded = (n + kStep - 1) / kStep * kStep;
      if (has_base) widen_part(args.base, at, n, padded, base, raw, scratch);
      for (int i = 0; i < n; ++i) sum[i] = 0;
      for (int64_t k = 0; k < models; ++k) {
        const V weight = static_cast<V>(args.weights[k * rows + row]);
        widen_part(args.models[k], at, n, padded, own, raw, scratch);
        for (int i = 0; i < n; ++i) sum[i] += weight * (has_base ? own[i] - base[i] : own[i]);
      }
      for (int i = 0; i < n; ++i) {
        if (has_base) sum[i] = base[i] + sum[i];
        const Key key = scalar_key(sum[i]);
        worst = key > worst ? key : worst;
      }
      for (int i = n; i < padded; ++i) sum[i] = 0;
      if constexpr (sizeof(V) == 8) {
        narrow(sum, padded, args.out.dtype, raw, reinterpret_cast<float*>(scratch));
      } else {
        narrow(sum, padded, args.out.dtype, raw);
      }
      const int bytes = dtype_bytes(args.out.dtype);
      std::memcpy(static_cast<char*>(args.out.data) + at * bytes, raw,
                  static_cast<size_t>(n) * bytes);
    }
  }
  *nonfinite = worst >= KeyOf<V>::kInfinity;
  return true;
}

void row_sum_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<RowSumContext*>(opaque);
  bool nonfinite = false;
  const bool done = context.args->compute == Dtype::kF64
                        ? sum_rows<double>(*context.args, first, last, &nonfinite)
                        : sum_rows<float>(*context.args, first, last, &nonfinite);
  if (!done) set_flag(&context.failed);
  if (nonfinite) set_flag(&context.nonfinite);
}

Status row_weighted_sum(const RowSumArgs* args) {
  const int64_t columns = args->columns;
  if (args->num_models < 1 || args->numel < 0 || columns < 1 || args->numel % columns != 0 ||
      args->out.data == nullptr) {
    return Status::kBadArgument;
  }
  RowSumContext context{args, 0, 0};
  const int64_t grain = columns >= kGrain ? 1 : kGrain / columns;
  parallel_ranges(args->numel / columns, grain, args->execution.num_threads, row_sum_range,
                  &context);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
