// Runs the threads of a block in turns on one CPU thread: each runs until it reaches a barrier or
// an operation of its warp, where it waits for the others; a warp runs as far as it can. Every
// second block runs in descending order, to reveal missing barriers. Dynamic shared memory starts
// with garbage.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <deque>
#include <memory>

namespace shim {

dim3 thread_index, block_index;
alignas(16) char dynamic_shared[48 << 10];

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;

enum class State { kReady, kWaiting, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  Place place = Place::kBarrier;
  int32_t value = 0;
  unsigned source = 0;
};

std::deque<Fiber> fibers;  // a context must not move
unsigned current = 0;
ucontext_t scheduler;
void (*function)(void*) = nullptr;
void* context = nullptr;
bool mistaken = false;

void enter() {
  for (;;) {  // a fiber serves one block after another
    function(context);
    fibers[current].state = State::kDone;
    swapcontext(&fibers[current].context, &scheduler);
  }
}

void prepare(unsigned count) {
  while (fibers.size() < count) {
    fibers.emplace_back();
    Fiber& fiber = fibers.back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, enter, 0);
  }
}

// Resumes threads [begin, end) if all of them wait at the same place.
bool release(unsigned begin, unsigned end, Place place) {
  int32_t sum = 0;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state != State::kWaiting || fibers[i].place != place) return false;
    sum += fibers[i].value;
  }
  int32_t brought[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) brought[i] = fibers[begin + i].value;
  for (unsigned i = begin; i < end; ++i) {
    fibers[i].value = place == Place::kWarpRead ? brought[fibers[i].source] : sum;
    fibers[i].state = State::kReady;
  }
  return true;
}

// Runs a warp until all its threads have finished or wait for the block.
bool run_warp(unsigned begin, bool descending) {
  do {
    for (unsigned i = 0; i < kWarp; ++i) {
      current = begin + (descending ? kWarp - 1 - i : i);
      if (fibers[current].state != State::kReady) continue;
      thread_index = dim3(current, 0, 0);
      swapcontext(&scheduler, &fibers[current].context);
      if (mistaken) return false;
    }
  } while (release(begin, begin + kWarp, Place::kWarpSum) ||
           release(begin, begin + kWarp, Place::kWarpRead));
  return true;
}

bool run_block(unsigned count, bool descending) {
  std::memset(dynamic_shared, 0xcd, sizeof(dynamic_shared));
  for (unsigned i = 0; i < count; ++i) fibers[i].state = State::kReady;
  for (;;) {
    for (unsigned i = 0; i < count; i += kWarp) {
      if (!run_warp(descending ? count - kWarp - i : i, descending)) return false;
    }
    bool done = true;
    for (unsigned i = 0; i < count; ++i) done = done && fibers[i].state == State::kDone;
    if (done) return true;
    if (!release(0, count, Place::kBarrier) && !release(0, count, Place::kBlockOr)) {
      return false;  // some threads wait for others that never arrive
    }
  }
}

}  // namespace

int32_t meet(Place place, int32_t value, int source) {
  Fiber& fiber = fibers[current];
  fiber.state = State::kWaiting;
  fiber.place = place;
  fiber.value = value;
  fiber.source = static_cast<unsigned>(source);
  swapcontext(&fiber.context, &scheduler);
  return fiber.value;
}

void mistake(const char*) {
  mistaken = true;
  for (;;) swapcontext(&fibers[current].context, &scheduler);
}

int launches = 0;

cudaError_t run_grid(void (*of_thread)(void*), void* argument, dim3 grid, dim3 block,
                     size_t shared) {
  ++launches;
  if (shared > sizeof(dynamic_shared)) return cudaErrorUnknown;
  prepare(block.x);
  function = of_thread;
  context = argument;
  mistaken = false;
  for (unsigned i = 0; i < grid.x; ++i) {
    block_index = dim3(i, 0, 0);
    if (!run_block(block.x, i % 2 == 1)) {
      fibers.clear();
      return cudaErrorUnknown;
    }
  }
  return cudaSuccess;
}

}  // namespace shim

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorUnknown; }

extern "C" int pymerge_shim_launches() { return shim::launches; }
