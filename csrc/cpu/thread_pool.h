// A small pool of threads with a fixed mapping of work to threads. It never spins, survives fork
// (the child gets a fresh pool), and does not depend on Python.
#pragma once

#include <cstdint>

namespace pymerge {

// Work on [begin, end) as thread number `thread`.
using RangeFunction = void (*)(void* context, int64_t begin, int64_t end, int thread);

// Split [0, size) into at most `num_threads` contiguous ranges whose borders are multiples of
// `grain`, and run them; the caller takes the first. Returns the number of ranges.
// num_threads <= 0 means default_threads().
int parallel_ranges(int64_t size, int64_t grain, int num_threads, RangeFunction function,
                    void* context);

// Returns the number of ranges that parallel_ranges would make.
int count_ranges(int64_t size, int64_t grain, int num_threads);

int default_threads();
void set_default_threads(int num_threads);

// A buffer of at least `bytes`, 64-byte aligned, which belongs to the calling thread until its next
// call; null if memory runs out.
void* thread_workspace(int64_t bytes);

}  // namespace pymerge
