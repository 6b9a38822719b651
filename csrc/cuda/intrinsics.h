// The few instructions that have no name in C++. Everything else in csrc/cuda is portable: the
// tests compile it for the CPU, with a header of the same name in place of this one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pymerge {
namespace cuda {

#define PM_DEVICE static __device__ __forceinline__

// For inputs that are read once and not written meanwhile: bypasses the L1 cache, in any order.
PM_DEVICE uint4 load_once(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

PM_DEVICE void store_once(uint4* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Unpacks the two halves of a word, lower first.
PM_DEVICE float2 unpack_f16(uint32_t pair) {
  float2 v;
  asm("{.reg .b16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.f32.f16 %0, low;\n\t"
      "cvt.f32.f16 %1, high;}"
      : "=f"(v.x), "=f"(v.y)
      : "r"(pair));
  return v;
}

// Round to nearest even; subnormals are kept, NaN stays NaN.
PM_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

PM_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 1 / x within one unit in the last place, for normal x.
PM_DEVICE float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Returns x in a way that the compiler cannot see through: values derived from it are recomputed
// rather than kept in registers.
PM_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The dynamic shared memory of the launch.
PM_DEVICE int32_t* dynamic_shared() {
  extern __shared__ int4 pymerge_dynamic_shared[];
  return reinterpret_cast<int32_t*>(pymerge_dynamic_shared);
}

PM_DEVICE int bits_in(uint32_t x) { return __popc(x); }

// Returns the x of another thread of the warp; all 32 threads must call it.
PM_DEVICE int32_t warp_read(int32_t x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

PM_DEVICE int32_t warp_sum(int32_t x) { return __reduce_add_sync(0xffffffffu, x); }

}  // namespace cuda
}  // namespace pymerge
