// The value types that the per-element math is written for.
//
// Math headers are templates over F, the value: `float` or `double` on CUDA, a GCC vector of them
// on the CPU. They need only arithmetic, comparisons that return a mask type, `mask ? a : b`, and
// the few functions here. Everything has internal linkage: the same header is compiled for several
// instruction sets into one library, and with a shared symbol one set's code could run on another.
#pragma once

#if defined(__CUDACC__)
#define PM_INLINE static __device__ __forceinline__
// An array indexed in a loop stays in registers only if the loop is unrolled.
#define PM_UNROLL _Pragma("unroll")
#else
#define PM_UNROLL _Pragma("GCC unroll 4")
#define PM_INLINE static inline __attribute__((always_inline))
#endif

namespace pymerge {

// Traits<F>: Scalar (float, double), Bits (the integer of the same shape), and Masks.
template <class F>
struct Traits;

template <class To, class From>
PM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class F>
PM_INLINE F splat(typename Traits<F>::Scalar value) {
  return value - F{};  // + would be an operation: it turns -0 into 0
}

template <class F>
PM_INLINE typename Traits<F>::Bits splat_bits(typename Traits<F>::IntScalar value) {
  return typename Traits<F>::Bits{} + value;
}

// Integers of the same shape, rounded to nearest even where they are too large to be exact.
template <class F>
PM_INLINE F to_float(typename Traits<F>::Bits value) {
#if defined(__CUDACC__)
  return static_cast<F>(value);
#else
  return __builtin_convertvector(value, F);
#endif
}

// Results of vector comparisons, as integers of the same shape, all ones where true. Instruction
// sets with mask registers have their own version.
template <class F, class Bits>
struct VectorMasks {
  using Mask = Bits;
  PM_INLINE Mask at_least(Bits key, Bits threshold) { return key >= threshold; }
  PM_INLINE Mask between(Bits key, Bits least, Bits most) { return (key >= least) & (most >= key); }
  PM_INLINE Mask greater(F a, F b) { return a > b; }
  // x > 0 or NaN, within `among`
  PM_INLINE Mask positive(F x, Mask among) { return ~(x <= F{}) & among; }
  PM_INLINE Mask zero(F x) { return x == F{}; }
  // a > b ? a : b and a < b ? a : b: the second where one is NaN
  PM_INLINE F larger(F a, F b) { return a > b ? a : b; }
  PM_INLINE F smaller(F a, F b) { return a < b ? a : b; }
  PM_INLINE Mask everything() { return Bits{} == Bits{}; }
  PM_INLINE Mask both(Mask a, Mask b) { return a & b; }
  PM_INLINE Mask either(Mask a, Mask b) { return a | b; }
  // x where chosen, else +0
  PM_INLINE F keep(F x, Mask chosen) { return bit_cast<F>(bit_cast<Bits>(x) & chosen); }
  // sum + x where chosen; sum is not -0
  PM_INLINE F add(F sum, F x, Mask chosen) { return sum + keep(x, chosen); }
  PM_INLINE Bits count(Bits counts, Mask chosen) { return counts - chosen; }
};

// bits(|x|): for finite values, ordered as |x| is.
template <class F>
PM_INLINE typename Traits<F>::Bits magnitude_key(F x) {
  return bit_cast<typename Traits<F>::Bits>(x) & Traits<F>::kMagnitudeMask;
}

}  // namespace pymerge
