// Drives an elementwise kernel over a range: alignment, tails, mixed dtypes, streaming stores.
#pragma once

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace pymerge {
namespace {

constexpr int64_t kGrain = 1 << 16;        // elements that justify waking another thread
constexpr int kLine = 64;                  // bytes of a cache line
constexpr int kPrefetchBytes = 512;        // how far ahead memory is prefetched
constexpr int kBlock = 512;                // elements converted at a time where dtypes are mixed
constexpr int64_t kStreamBytes = 1 << 20;  // outputs of at least this size bypass the caches

// Returns whether any of the keys, each the largest of its lane, is that of NaN or infinity.
inline bool has_nonfinite(I worst) {
  return lane_bits(FloatMasks::at_least(worst, I{} + Traits<F>::kInfinity)) != 0;
}

inline void set_flag(int32_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

// Prefetches the data of a step some way ahead. A kernel that computes fills the reorder buffer
// with few steps, too few to keep the memory busy by themselves.
template <class Io, int kStreams>
PM_INLINE void prefetch_ahead(const char* const* in, int64_t at) {
#pragma GCC unroll 17
  for (int i = 0; i < kStreams; ++i) {
    for (int line = 0; line < kStep * Io::kBytes; line += kLine) {
      __builtin_prefetch(in[i] + at + kPrefetchBytes + line);
    }
  }
}

enum class Store { kCached, kStream, kNone };

// The operands of one call: stream 0 is the base if there is one, then the models.
struct Streams {
  const Operand* base;  // null: none
  const Operand* models;
  int num_models;
  MutableOperand out;  // data == null: nothing is stored
  Dtype compute;
  int64_t written = 0;  // elements that one thread writes, if they span more than one range

  int count() const { return num_models + (base != nullptr ? 1 : 0); }
  const Operand& at(int i) const {
    if (base == nullptr) return models[i];
    return i == 0 ? *base : models[i - 1];
  }
  // Whether all streams share one dtype and can be read and written without conversion; sets it.
  bool uniform(Dtype* dtype) const {
    *dtype = at(0).dtype;
    for (int i = 1; i < count(); ++i) {
      if (at(i).dtype != *dtype) return false;
    }
    return *dtype != Dtype::kF64 && compute == Dtype::kF32 &&
           (out.data == nullptr || out.dtype == *dtype);
  }
};

// Workspace of one thread: pointers, then room for a block of every stream and of the output.
struct Room {
  const char** pointers;
  char* data;
  char* more;  // additional room, as requested

  static int64_t bytes(int streams, int lane_bytes) {
    return (streams * 8 + 63) / 64 * 64 + static_cast<int64_t>(streams + 4) * kBlock * lane_bytes;
  }
  bool take(int streams, int lane_bytes, int64_t extra) {
    char* all = static_cast<char*>(thread_workspace(bytes(streams, lane_bytes) + extra));
    if (all == nullptr) return false;
    pointers = reinterpret_cast<const char**>(all);
    data = all + (streams * 8 + 63) / 64 * 64;
    more = all + bytes(streams, lane_bytes);
    return true;
  }
};

// A kernel that needs the position of its elements has a member `at`: the number of the first one,
// counted from the beginning of the operands.
template <class Kernel>
PM_INLINE auto locate(Kernel& kernel, int64_t at, int) -> decltype(kernel.at, void()) {
  kernel.at = at;
}
template <class Kernel>
PM_INLINE void locate(Kernel&, int64_t, long) {}

// Kernel concept: template <class Io> void run(const char* const* in, char* out, int64_t n, Store)
// with n a multiple of kStep; `in` in the order of Streams.
template <class Io, class Kernel>
void run_padded(Kernel& kernel, const Streams& streams, Room& room, int64_t begin, int n) {
  const int bytes = kStep * Io::kBytes;
  for (int i = 0; i < streams.count(); ++i) {
    char* copy = room.data + i * bytes;
    std::memset(copy, 0, bytes);
    std::memcpy(copy, static_cast<const char*>(streams.at(i).data) + begin * Io::kBytes,
                static_cast<size_t>(n) * Io::kBytes);
    room.pointers[i] = copy;
  }
  char* out = room.data + streams.count() * bytes;
  const bool store = streams.out.data != nullptr;
  locate(kernel, begin, 0);
  kernel.template run<Io>(room.pointers, out, kStep, store ? Store::kCached : Store::kNone);
  if (store) {
    std::memcpy(static_cast<char*>(streams.out.data) + begin * Io::kBytes, out,
                static_cast<size_t>(n) * Io::kBytes);
  }
}

template <class Io, class Kernel>
void run_uniform(Kernel& kernel, const Streams& streams, Room& room, int64_t begin, int64_t end) {
  char* out = static_cast<char*>(streams.out.data);
  Store store = out == nullptr ? Store::kNone : Store::kCached;
  const int64_t written = streams.written > 0 ? streams.written : end - begin;
  if (out != nullptr && written * Io::kBytes >= kStreamBytes) {
    const auto address = reinterpret_cast<uintptr_t>(out + begin * Io::kBytes);
    const auto past = address % PM_VECTOR_BYTES;
    if (past % Io::kBytes == 0) {
      store = Store::kStream;
      const int head = past == 0 ? 0 : static_cast<int>((PM_VECTOR_BYTES - past) / Io::kBytes);
      if (head > 0) run_padded<Io>(kernel, streams, room, begin, head);
      begin += head;
    }
  }
  const int64_t bulk = (end - begin) / kStep * kStep;
  if (bulk > 0) {
    for (int i = 0; i < streams.count(); ++i) {
      room.pointers[i] = static_cast<const char*>(streams.at(i).data) + begin * Io::kBytes;
    }
    locate(kernel, begin, 0);
    kernel.template run<Io>(room.pointers, out == nullptr ? nullptr : out + begin * Io::kBytes,
                            bulk, store);
    if (store == Store::kStream) stream_fence();
  }
  if (begin + bulk < end) {
    run_padded<Io>(kernel, streams, room, begin + bulk, static_cast<int>(end - begin - bulk));
  }
}

// Any mixture of dtypes: blocks are converted to the compute type, processed, and converted back.
template <class Io, class Kernel>
void run_mixed(Kernel& kernel, const Streams& streams, Room& room, int64_t begin, int64_t end) {
  using Value = typename Io::Value;
  constexpr int64_t kBlockBytes = kBlock * static_cast<int64_t>(sizeof(Value));
  char* out = room.data + streams.count() * kBlockBytes;
  char* raw = out + kBlockBytes;      // a padded copy of a tail
  char* scratch = raw + kBlockBytes;  // for conversions through fp32
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const int padded = (n + kStep - 1) / kStep * kStep;
    for (int i = 0; i < streams.count(); ++i) {
      const Operand& operand = streams.at(i);
      const int bytes = dtype_bytes(operand.dtype);
      const char* from = static_cast<const char*>(operand.data) + at * bytes;
      if (n < padded) {
        std::memset(raw, 0, static_cast<size_t>(padded) * bytes);
        std::memcpy(raw, from, static_cast<size_t>(n) * bytes);
        from = raw;
      }
      char* to = room.data + i * kBlockBytes;
      Io::widen_block(operand.dtype, from, padded, to, scratch);
      room.pointers[i] = to;
    }
    const bool store = streams.out.data != nullptr;
    locate(kernel, at, 0);
    kernel.template run<typename Io::Lanes>(room.pointers, out, padded,
                                            store ? Store::kCached : Store::kNone);
    if (store) {
      const int bytes = dtype_bytes(streams.out.dtype);
      Io::narrow_block(out, padded, streams.out.dtype, raw, scratch);
      std::memcpy(static_cast<char*>(streams.out.data) + at * bytes, raw,
                  static_cast<size_t>(n) * bytes);
    }
  }
}

// The compute types of run_mixed.
struct Mixed32 {
  using Value = float;
  using Lanes = F32;
  static void widen_block(Dtype dtype, const char* from, int n, char* to, char*) {
    widen(dtype, from, n, reinterpret_cast<float*>(to));
  }
  static void narrow_block(const char* from, int n, Dtype dtype, char* to, char*) {
    narrow(reinterpret_cast<const float*>(from), n, dtype, to);
  }
};

struct Mixed64 {
  using Value = double;
  using Lanes = Mixed64;
  static constexpr int kBytes = 8;
  static void widen_block(Dtype dtype, const char* from, int n, char* to, char* scratch) {
    widen(dtype, from, n, reinterpret_cast<double*>(to), reinterpret_cast<float*>(scratch));
  }
  static void narrow_block(const char* from, int n, Dtype dtype, char* to, char* scratch) {
    narrow(reinterpret_cast<const double*>(from), n, dtype, to, reinterpret_cast<float*>(scratch));
  }
};

// Converts n elements of an operand from `at` on to V, fills up with zeros to `padded`, a multiple
// of kStep, and subtracts `minus` if given. `raw` has room for `padded` elements of 8 bytes,
// `scratch` for `padded` floats.
template <class V>
void widen_part(const Operand& operand, int64_t at, int n, int padded, V* to, char* raw,
                char* scratch, const V* minus = nullptr) {
  const int bytes = dtype_bytes(operand.dtype);
  const char* from = static_cast<const char*>(operand.data) + at * bytes;
  if (n < padded) {
    std::memset(raw, 0, static_cast<size_t>(padded) * bytes);
    std::memcpy(raw, from, static_cast<size_t>(n) * bytes);
    from = raw;
  }
  if constexpr (sizeof(V) == 8) {
    widen(operand.dtype, from, padded, to, reinterpret_cast<float*>(scratch));
    for (int i = 0; i < padded && minus != nullptr; ++i) to[i] = to[i] - minus[i];
  } else {
    widen(operand.dtype, from, padded, to, minus);
  }
}

// The keys of scalars, as magnitude_key defines them.
template <class V>
struct KeyOf {
  using Type = int32_t;
  static constexpr Type kLargest = INT32_MAX;
  static constexpr Type kInfinity = 0x7f800000;
};
template <>
struct KeyOf<double> {
  using Type = int64_t;
  static constexpr Type kLargest = INT64_MAX;
  static constexpr Type kInfinity = 0x7ff0000000000000;
};

template <class V>
PM_INLINE typename KeyOf<V>::Type scalar_key(V value) {
  typename KeyOf<V>::Type key;
  std::memcpy(&key, &value, sizeof(V));
  return key & KeyOf<V>::kLargest;
}

// Processes [begin, end) with the kernel for fp32 arithmetic.
template <class Kernel>
void run_range(Kernel& kernel, const Streams& streams, Room& room, int64_t begin, int64_t end) {
  Dtype dtype;
  if (!streams.uniform(&dtype)) {
    run_mixed<Mixed32>(kernel, streams, room, begin, end);
  } else if (dtype == Dtype::kBF16) {
    run_uniform<Bf16>(kernel, streams, room, begin, end);
  } else if (dtype == Dtype::kF16) {
    run_uniform<F16>(kernel, streams, room, begin, end);
  } else {
    run_uniform<F32>(kernel, streams, room, begin, end);
  }
}

}  // namespace
}  // namespace pymerge
