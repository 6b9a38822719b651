// Sums over a block, added to counters in device memory. Each takes one atomic operation on
// integers, so the order does not matter.
#pragma once

#include "cuda/table.h"

namespace pymerge {
namespace cuda {

// The sum over the block, in thread 0. All threads must call it.
PM_DEVICE int64_t block_sum(int32_t x) {
  __shared__ int32_t partial[kThreads / 32];
  const int32_t sum = warp_sum(x);
  __syncthreads();  // the values of the previous call have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  int64_t total = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) total += partial[i];
  }
  return total;
}

PM_DEVICE void add_to(int64_t* counter, int64_t x) {
  if (x != 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(x));
}

PM_DEVICE void add_to(int32_t* counter, int64_t x) {
  if (x != 0) atomicAdd(counter, static_cast<int32_t>(x));
}

// Raises a flag to at least 1: blocks that find the same thing do not count it twice.
PM_DEVICE void raise_flag(int64_t* flag) {
  atomicMax(reinterpret_cast<unsigned long long*>(flag), 1ull);
}

}  // namespace cuda
}  // namespace pymerge
