// How kernels access elements in memory: 16 bytes at a time if all operands share one dtype, one
// element at a time otherwise.
#pragma once

#include "cuda/table.h"
#include "math/value.h"

namespace pymerge {
namespace cuda {

// word is a constant wherever loops are unrolled.
PM_DEVICE uint32_t word_of(const uint4& raw, int word) {
  return word == 0 ? raw.x : word == 1 ? raw.y : word == 2 ? raw.z : raw.w;
}

PM_DEVICE void set_word(uint4& raw, int word, uint32_t value) {
  if (word == 0) raw.x = value;
  if (word == 1) raw.y = value;
  if (word == 2) raw.z = value;
  if (word == 3) raw.w = value;
}

// One struct for each dtype: kPerWord elements in a word of 32 bits; `get` returns one of them as a
// float, `put` packs them into a word; `load` and `store` take one element at a multiple of its
// size.
struct Bf16 {
  static constexpr int kPerWord = 2;
  static constexpr int kBytes = 2;
  PM_DEVICE float get(uint32_t word, int half) {
    return bit_cast<float>(half == 0 ? word << 16 : word & 0xffff0000u);
  }
  PM_DEVICE uint32_t put(const float (&x)[2]) { return pack_bf16(x[0], x[1]); }
  PM_DEVICE float load(const void* p, int64_t i) {
    return bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16);
  }
  PM_DEVICE void store(void* p, int64_t i, float x) {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(pack_bf16(x, 0.0f));
  }
};

struct F16 {
  static constexpr int kPerWord = 2;
  static constexpr int kBytes = 2;
  PM_DEVICE float get(uint32_t word, int half) {
    const float2 both = unpack_f16(word);
    return half == 0 ? both.x : both.y;
  }
  PM_DEVICE uint32_t put(const float (&x)[2]) { return pack_f16(x[0], x[1]); }
  PM_DEVICE float load(const void* p, int64_t i) {
    return unpack_f16(static_cast<const uint16_t*>(p)[i]).x;
  }
  PM_DEVICE void store(void* p, int64_t i, float x) {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(pack_f16(x, 0.0f));
  }
};

struct F32 {
  static constexpr int kPerWord = 1;
  static constexpr int kBytes = 4;
  PM_DEVICE float get(uint32_t word, int) { return bit_cast<float>(word); }
  PM_DEVICE uint32_t put(const float (&x)[1]) { return bit_cast<uint32_t>(x[0]); }
  PM_DEVICE float load(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
  PM_DEVICE void store(void* p, int64_t i, float x) { static_cast<float*>(p)[i] = x; }
};

template <class Io>
constexpr int kPerVector = 4 * Io::kPerWord;

// The number of whole vectors of a tile that can be accessed 16 bytes at a time.
template <class Io>
PM_DEVICE int vectors_of(const Head& head, const Tile& tile) {
  return (head.flags & kAligned) != 0 ? tile.count / kPerVector<Io> : 0;
}

PM_DEVICE const uint4* vector_at(const void* p, int64_t element, int bytes) {
  return reinterpret_cast<const uint4*>(static_cast<const char*>(p) + element * bytes);
}

PM_DEVICE uint4* vector_at(void* p, int64_t element, int bytes) {
  return reinterpret_cast<uint4*>(static_cast<char*>(p) + element * bytes);
}

// Vector `at` of a tile. An unsigned offset, which one addition joins to an address that all
// threads share, takes half the registers of an address for each thread.
PM_DEVICE uint4 load_vector(const uint4* tile, int at) {
  const char* begin = reinterpret_cast<const char*>(tile);
  return load_once(reinterpret_cast<const uint4*>(begin + (static_cast<uint32_t>(at) << 4)));
}

PM_DEVICE void store_vector(uint4* tile, int at, uint4 value) {
  char* begin = reinterpret_cast<char*>(tile);
  store_once(reinterpret_cast<uint4*>(begin + (static_cast<uint32_t>(at) << 4)), value);
}

// An element of any dtype at any address, widened or narrowed to the compute type.
template <class Raw>
PM_DEVICE Raw load_raw(const void* p, int64_t i) {
  const char* at = static_cast<const char*>(p) + i * static_cast<int64_t>(sizeof(Raw));
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Raw) == 0) return *reinterpret_cast<const Raw*>(at);
  Raw raw = 0;
  for (int byte = 0; byte < static_cast<int>(sizeof(Raw)); ++byte) {
    raw |= static_cast<Raw>(static_cast<Raw>(static_cast<uint8_t>(at[byte])) << (8 * byte));
  }
  return raw;
}

template <class Raw>
PM_DEVICE void store_raw(void* p, int64_t i, Raw raw) {
  char* at = static_cast<char*>(p) + i * static_cast<int64_t>(sizeof(Raw));
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Raw) == 0) {
    *reinterpret_cast<Raw*>(at) = raw;
    return;
  }
  for (int byte = 0; byte < static_cast<int>(sizeof(Raw)); ++byte) {
    at[byte] = static_cast<char>(raw >> (8 * byte));
  }
}

template <class F>
PM_DEVICE F load_any(const void* p, int32_t dtype, int64_t i) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kF64:
      return static_cast<F>(bit_cast<double>(load_raw<uint64_t>(p, i)));
    case Dtype::kF32:
      return bit_cast<float>(load_raw<uint32_t>(p, i));
    case Dtype::kF16:
      return unpack_f16(load_raw<uint16_t>(p, i)).x;
    default:
      return bit_cast<float>(static_cast<uint32_t>(load_raw<uint16_t>(p, i)) << 16);
  }
}

// A double is converted to 16 bits through a float, as in torch.
template <class F>
PM_DEVICE void store_any(void* p, int32_t dtype, int64_t i, F x) {
  const float single = static_cast<float>(x);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kF64:
      return store_raw(p, i, bit_cast<uint64_t>(static_cast<double>(x)));
    case Dtype::kF32:
      return store_raw(p, i, bit_cast<uint32_t>(single));
    case Dtype::kF16:
      return store_raw(p, i, static_cast<uint16_t>(pack_f16(single, 0.0f)));
    default:
      return store_raw(p, i, static_cast<uint16_t>(pack_bf16(single, 0.0f)));
  }
}

// Any dtypes at any address, one element at a time, computed in F.
template <class F>
struct Mixed {};

// Calls pick with the Io of a dtype of 16 or 32 bits.
template <class Pick>
auto by_dtype(Dtype dtype, Pick pick) {
  if (dtype == Dtype::kBF16) return pick(Bf16{});
  if (dtype == Dtype::kF16) return pick(F16{});
  return pick(F32{});
}

// Calls pick with the Io for a kind of operands.
template <class Pick>
auto by_kind(Dtype dtype, bool mixed, Pick pick) {
  if (dtype == Dtype::kF64) return pick(Mixed<double>{});
  if (mixed) return pick(Mixed<float>{});
  return by_dtype(dtype, pick);
}

// Elements of a stream, one at a time, for a kernel over one dtype or over Mixed.
template <class Io>
struct Elements {
  using F = float;
  static constexpr bool kMixed = false;
  PM_DEVICE float load(const void* p, int32_t, int64_t i) { return Io::load(p, i); }
  PM_DEVICE void store(void* p, int32_t, int64_t i, float x) { Io::store(p, i, x); }
};

template <class AnyF>
struct Elements<Mixed<AnyF>> {
  using F = AnyF;
  static constexpr bool kMixed = true;
  PM_DEVICE F load(const void* p, int32_t dtype, int64_t i) { return load_any<F>(p, dtype, i); }
  PM_DEVICE void store(void* p, int32_t dtype, int64_t i, F x) { store_any<F>(p, dtype, i, x); }
};

}  // namespace cuda
}  // namespace pymerge
