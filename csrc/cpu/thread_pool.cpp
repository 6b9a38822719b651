#include "cpu/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace pymerge {
namespace {

int available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Job {
  int64_t size;
  int64_t step;  // length of a range
  int ranges;
  RangeFunction function;
  void* context;

  void run(int range) const {
    const int64_t begin = range * step;
    function(context, begin, std::min(size, begin + step), range);
  }
};

class Pool {
 public:
  void run(const Job& job) {
    // One job at a time; a second caller waits its turn.
    std::lock_guard<std::mutex> turn(turn_);
    grow(job.ranges - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      pending_ = job.ranges - 1;
      ++generation_;
    }
    if (job.ranges > 1) start_.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(threads_.size()) < workers) {
      const int number = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, number, seen = generation_]() mutable { work(number, seen); });
      threads_.back().detach();  // they live as long as the process
    }
  }

  void work(int number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (number >= job_.ranges) continue;
      const Job job = job_;
      lock.unlock();
      job.run(number);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  std::vector<std::thread> threads_;
  Job job_{};
  int pending_ = 0;
  uint64_t generation_ = 0;
};

std::mutex pool_guard;
Pool* pool = nullptr;
pid_t pool_owner = 0;
int threads_wanted = 0;

// Never destroyed: workers may still wait on it while the process exits.
Pool& current_pool() {
  std::lock_guard<std::mutex> lock(pool_guard);
  if (pool == nullptr || pool_owner != getpid()) {
    pool = new Pool;
    pool_owner = getpid();
  }
  return *pool;
}

int64_t range_step(int64_t size, int64_t grain, int num_threads) {
  const int64_t threads = num_threads > 0 ? num_threads : default_threads();
  const int64_t grains = (size + grain - 1) / grain;
  const int64_t each = (grains + threads - 1) / threads;
  return std::max<int64_t>(1, each) * grain;
}

struct Workspace {
  void* data = nullptr;
  int64_t size = 0;
  ~Workspace() { std::free(data); }
};

}  // namespace

int default_threads() { return threads_wanted > 0 ? threads_wanted : available_cores(); }

void set_default_threads(int num_threads) { threads_wanted = num_threads; }

int count_ranges(int64_t size, int64_t grain, int num_threads) {
  if (size <= 0) return 0;
  const int64_t step = range_step(size, grain, num_threads);
  return static_cast<int>((size + step - 1) / step);
}

int parallel_ranges(int64_t size, int64_t grain, int num_threads, RangeFunction function,
                    void* context) {
  const int ranges = count_ranges(size, grain, num_threads);
  if (ranges == 0) return 0;
  const Job job{size, range_step(size, grain, num_threads), ranges, function, context};
  if (ranges == 1) {
    job.run(0);
  } else {
    current_pool().run(job);
  }
  return ranges;
}

void* thread_workspace(int64_t bytes) {
  thread_local Workspace workspace;
  if (workspace.size < bytes) {
    std::free(workspace.data);
    const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    workspace.data = std::aligned_alloc(64, rounded);
    workspace.size = workspace.data == nullptr ? 0 : static_cast<int64_t>(rounded);
  }
  return workspace.data;
}

}  // namespace pymerge
