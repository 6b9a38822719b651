// The parts of CUDA that csrc/cuda needs, on the CPU: enough to run its kernels thread by thread
// and compare their results. Only the tests use it. See shim.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

#define CUDART_VERSION 0

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorUnknown = 999 };
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) {
  return "the shim found a mistake in a kernel";
}
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorUnknown"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device);
template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Function*) {
  return cudaSuccess;
}

namespace shim {

extern dim3 thread_index, block_index;
extern char dynamic_shared[48 << 10];

// Runs function(context) once for each thread of each block.
cudaError_t run_grid(void (*function)(void*), void* context, dim3 grid, dim3 block, size_t shared);

// Waits until all threads of the warp or the block have reached the same place; returns the sum of
// their values, or the value of thread `source` of the warp.
enum class Place { kBarrier, kBlockOr, kWarpSum, kWarpRead };
int32_t meet(Place place, int32_t value, int source = 0);

// Reports a mistake that hardware would punish. Does not return.
[[noreturn]] void mistake(const char* what);

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index

template <class Parameter>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameter), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  struct Call {
    void (*kernel)(Parameter);
    Parameter* parameter;
  } call{kernel, static_cast<Parameter*>(arguments[0])};
  const auto function = [](void* context) {
    const Call& call = *static_cast<Call*>(context);
    call.kernel(*call.parameter);
  };
  return shim::run_grid(function, &call, grid, block, shared);
}

inline void __syncthreads() { shim::meet(shim::Place::kBarrier, 0); }
inline int __syncthreads_or(int x) { return shim::meet(shim::Place::kBlockOr, x != 0) != 0; }
inline int __shfl_sync(unsigned, int x, int lane) {
  return shim::meet(shim::Place::kWarpRead, x, lane & 31);
}
inline int __reduce_add_sync(unsigned, int x) { return shim::meet(shim::Place::kWarpSum, x); }

template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}
template <class T>
T atomicMax(T* p, T x) {
  const T before = *p;
  if (x > before) *p = x;
  return before;
}
