// Ranks within rows, and weighted sums with separate weights for each row.
#pragma once

#include "cpu/kernels_weighted_sum.h"

namespace pymerge {
namespace {

constexpr int kShortRow = 64;  // elements up to which insertion beats counting

// An element of a row: its key above its place in the row, so that comparing the numbers orders the
// elements.
template <class Key>
struct RowItem {
  Key key;
  int32_t index;

  RowItem() = default;
  RowItem(Key k, int32_t i) : key(k), index(i) {}
  Key key_bits() const { return key; }
  int32_t place() const { return index; }
  bool operator<(const RowItem& other) const {
    return key < other.key || (key == other.key && index < other.index);
  }
};
template <>
struct RowItem<int32_t> {
  uint64_t both;

  RowItem() = default;
  RowItem(int32_t k, int32_t i)
      : both(static_cast<uint64_t>(static_cast<uint32_t>(k)) << 32 | static_cast<uint32_t>(i)) {}
  int32_t key_bits() const { return static_cast<int32_t>(both >> 32); }
  int32_t place() const { return static_cast<int32_t>(both & UINT32_MAX); }
  bool operator<(const RowItem& other) const { return both < other.both; }
};

// Sorts the elements of a row by key, equal keys by index. This is a radix sort with digits of 10
// bits, least significant first. Rows that are not long are sorted by their two most significant
// digits only; this leaves few neighbours in the wrong order, which insertion fixes. If it leaves
// many after all, every digit is used.
template <class Key>
struct RowSorter {
  using Item = RowItem<Key>;
  static constexpr int kDigitBits = 10;
  static constexpr int kDigits = 1 << kDigitBits;
  static constexpr int kKeyBits = 8 * static_cast<int>(sizeof(Key)) - 1;  // keys are not negative
  static constexpr int kPasses = (kKeyBits + kDigitBits - 1) / kDigitBits;
  static constexpr int32_t kLongRow = 1 << 15;
  static constexpr int kMoves = 4;  // allowed for each element

  Item* items;      // [columns]
  Item* other;      // [columns]
  int32_t* digits;  // [2][kDigits]

  static int64_t bytes(int64_t columns) {
    return 2 * columns * static_cast<int64_t>(sizeof(Item)) +
           2 * kDigits * static_cast<int64_t>(sizeof(int32_t));
  }

  RowSorter(void* memory, int64_t columns)
      : items(static_cast<Item*>(memory)),
        other(items + columns),
        digits(reinterpret_cast<int32_t*>(other + columns)) {}

  // `items` has the elements in order.
  void rank(int32_t n, int32_t* ranks) {
    if (n <= kShortRow) {
      insert(n, INT64_MAX, ranks);
      return;
    }
    if (n <= kLongRow) {
      sort<2>(n);
      if (insert(n, static_cast<int64_t>(kMoves) * n, ranks)) return;
      for (int32_t i = 0; i < n; ++i) other[items[i].place()] = items[i];
      swap();
    }
    sort<kPasses>(n);
    for (int32_t i = 0; i < n; ++i) ranks[items[i].place()] = i;
  }

  // Writes the ranks of items that are nearly in order; returns whether `moves` moves were enough.
  bool insert(int32_t n, int64_t moves, int32_t* ranks) {
    Item last = items[0];
    ranks[last.place()] = 0;
    for (int32_t i = 1; i < n; ++i) {
      const Item item = items[i];
      ranks[item.place()] = i;
      if (__builtin_expect(!(item < last), 1)) {
        last = item;
        continue;
      }
      int32_t at = i;
      do {
        items[at] = items[at - 1];
        ranks[items[at].place()] = at;
        --at;
      } while (at > 0 && item < items[at - 1]);
      items[at] = item;
      ranks[item.place()] = at;
      moves -= i - at;
      if (moves < 0) return false;
    }
    return true;
  }

  // The shift of a digit, from the most significant one.
  static constexpr int shift_of(int number) {
    return kKeyBits > (number + 1) * kDigitBits ? kKeyBits - (number + 1) * kDigitBits : 0;
  }
  static int digit(const Item& item, int number) {
    return static_cast<int>(item.key_bits() >> shift_of(number) & (kDigits - 1));
  }

  // Sorts by the kCount most significant digits.
  template <int kCount>
  void sort(int32_t n) {
#pragma GCC unroll 8
    for (int number = kCount - 1; number >= 0; --number) sort_by_digit(n, number);
  }

  // Neighbours often share a digit, and a number that was just stored is slow to read back. So the
  // two halves of a row have separate tables, and are counted and moved alternately.
  __attribute__((always_inline)) void sort_by_digit(int32_t n, int number) {
    const int32_t half = n / 2;
    int32_t *const first = digits, *const second = digits + kDigits;
    std::memset(digits, 0, 2 * kDigits * sizeof(int32_t));
    for (int32_t i = 0; i < half; ++i) {
      ++first[digit(items[i], number)];
      ++second[digit(items[half + i], number)];
    }
    if (2 * half < n) ++second[digit(items[n - 1], number)];
    // If all items share the digit, there is nothing to move.
    const int shared = digit(items[0], number);
    if (first[shared] + second[shared] == n) return;
    int32_t sum = 0;
    for (int d = 0; d < kDigits; ++d) {
      const int32_t many = first[d], more = second[d];
      first[d] = sum;
      second[d] = sum + many;
      sum += many + more;
    }
    const Item* const from = items;
    Item* const to = other;
    for (int32_t i = 0; i < half; ++i) {
      const Item a = from[i], b = from[half + i];
      to[first[digit(a, number)]++] = a;
      to[second[digit(b, number)]++] = b;
    }
    if (2 * half < n) {
      const Item last = from[n - 1];
      to[second[digit(last, number)]++] = last;
    }
    swap();
  }

  void swap() {
    Item* sorted = other;
    other = items;
    items = sorted;
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
  // Blocks of both inputs, a padded copy, and room for conversions through fp32.
  constexpr int64_t kRoom = 4 * kBlock * 8;
  char* memory = static_cast<char*>(thread_workspace(kRoom + RowSorter<Key>::bytes(columns)));
  if (memory == nullptr) return false;
  V* base = reinterpret_cast<V*>(memory);
  V* delta = base + kBlock;
  char* raw = reinterpret_cast<char*>(delta + kBlock);
  char* scratch = raw + kBlock * 8;
  RowSorter<Key> sorter(memory + kRoom, columns);
  for (int64_t item = first; item < last; ++item) {
    const int64_t k = item / rows, row = item % rows;
    for (int64_t at = 0; at < columns; at += kBlock) {
      const int n = static_cast<int>(columns - at < kBlock ? columns - at : kBlock);
      const int padded = (n + kStep - 1) / kStep * kStep;
      widen_part(args.base, row * columns + at, n, padded, base, raw, scratch);
      widen_part(args.models[k], row * columns + at, n, padded, delta, raw, scratch, base);
      for (int i = 0; i < n; ++i) {
        sorter.items[at + i] = {scalar_key(delta[i]), static_cast<int32_t>(at + i)};
      }
    }
    sorter.rank(static_cast<int32_t>(columns), args.ranks + k * args.stride + row * columns);
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

// Runs a kernel of weighted sums row by row.
template <class V, class Kernel, class Run>
void sum_rows(const RowSumArgs& args, int64_t first, int64_t last, V* weights, Kernel& kernel,
              Run run) {
  const int64_t columns = args.columns, rows = args.numel / columns;
  kernel.weights = weights;
  for (int64_t row = first; row < last; ++row) {
    for (int64_t k = 0; k < args.num_models; ++k) {
      weights[k] = static_cast<V>(args.weights[k * rows + row]);
    }
    run(row * columns, (row + 1) * columns);
  }
}

void row_sum_range(void* opaque, int64_t first, int64_t last, int) {
  auto& context = *static_cast<RowSumContext*>(opaque);
  const RowSumArgs& args = *context.args;
  const bool has_base = args.base.data != nullptr, wide = args.compute == Dtype::kF64;
  const int lane_bytes = wide ? 8 : 4;
  Streams streams{has_base ? &args.base : nullptr, args.models, args.num_models, args.out,
                  args.compute};
  streams.written = (last - first) * args.columns;
  Room room;
  if (!room.take(streams.count(), lane_bytes, 8 * static_cast<int64_t>(args.num_models))) {
    return set_flag(&context.failed);
  }
  if (wide) {
    WeightedSum64 kernel{nullptr, args.num_models, has_base, false, 1.0, 1.0, true};
    sum_rows(
        args, first, last, reinterpret_cast<double*>(room.more), kernel,
        [&](int64_t begin, int64_t end) { run_mixed<Mixed64>(kernel, streams, room, begin, end); });
    if (!kernel.finite) set_flag(&context.nonfinite);
  } else {
    WeightedSumKernel kernel{nullptr, args.num_models, has_base, false, 1.0f, 1.0f, I{}};
    sum_rows(args, first, last, reinterpret_cast<float*>(room.more), kernel,
             [&](int64_t begin, int64_t end) { run_range(kernel, streams, room, begin, end); });
    if (has_nonfinite(kernel.worst)) set_flag(&context.nonfinite);
  }
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
