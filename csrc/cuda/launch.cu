#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/launch.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int64_t kMostBlocks = INT32_MAX;

thread_local char error_text[256];

Status fail(cudaError_t error, const char* what) {
  std::snprintf(error_text, sizeof(error_text), "%s: %s (%s)", what, cudaGetErrorString(error),
                cudaGetErrorName(error));
  cudaGetLastError();  // clears an error that is not sticky
  return error == cudaErrorMemoryAllocation ? Status::kOutOfMemory : Status::kDeviceFailure;
}

// Makes a device current during its lifetime.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

// Records waiting for one launch.
struct Batch {
  Launch launch;
  int64_t blocks = 0;
  Table table;

  explicit Batch(const Launch& wanted) : launch(wanted) {
    table.count = 0;
    table.stride = wanted.stride;
    table.num_models = wanted.num_models;
    table.reserved = 0;
  }
  bool takes(const Launch& other) const {
    return launch.kernel == other.kernel && launch.num_models == other.num_models &&
           launch.stride == other.stride;
  }
  bool has_room(int64_t more) const {
    return (table.count + 1) * static_cast<int64_t>(table.stride) <= kRecordBytes &&
           blocks + more <= kMostBlocks;
  }
  void add(const Launch& wanted, const void* record, int64_t more) {
    char* to = table.records + table.count * static_cast<int64_t>(table.stride);
    std::memcpy(to, record, static_cast<size_t>(table.stride));
    const int32_t first = static_cast<int32_t>(blocks);
    std::memcpy(to, &first, sizeof(first));
    if (wanted.shared_bytes > launch.shared_bytes) launch.shared_bytes = wanted.shared_bytes;
    blocks += more;
    ++table.count;
  }
  Status start(const Execution& execution) {
    if (table.count == 0) return Status::kOk;
    const CurrentDevice device(execution.device);
    if (device.error() != cudaSuccess) return fail(device.error(), "choosing the device");
    void* arguments[] = {&table};
    const cudaError_t error = cudaLaunchKernel(
        launch.kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
        static_cast<size_t>(launch.shared_bytes), static_cast<cudaStream_t>(execution.stream));
    table.count = 0;
    blocks = 0;
    return error == cudaSuccess ? Status::kOk : fail(error, "launching a kernel");
  }
};

struct Phase {
  bool open = false;
  Execution execution{};
  std::vector<std::unique_ptr<Batch>> batches;

  bool covers(const Execution& other) const {
    return open && execution.device == other.device && execution.stream == other.stream;
  }
};

thread_local Phase phase;

}  // namespace

Status fail(Status status, const char* why) {
  std::snprintf(error_text, sizeof(error_text), "%s", why);
  return status;
}

const char* last_error() { return error_text; }

Status begin(const Execution* execution) {
  if (phase.open) return fail(Status::kBadArgument, "a phase has begun already");
  phase.open = true;
  phase.execution = *execution;
  return Status::kOk;
}

Status end(const Execution* execution) {
  if (!phase.covers(*execution)) {
    return fail(Status::kBadArgument, "no phase has begun on this device and stream");
  }
  Status status = Status::kOk;
  for (const auto& batch : phase.batches) {
    const Status one = batch->start(phase.execution);
    if (one != Status::kOk) status = one;
  }
  phase.batches.clear();
  phase.open = false;
  return status;
}

Status check(const Execution* execution, Kernel kernel) {
  const CurrentDevice device(execution->device);
  if (device.error() != cudaSuccess) return fail(device.error(), "choosing the device");
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess ? Status::kOk : fail(error, "loading the kernels");
}

Status run(const Execution& execution, const Launch& launch, const void* record, int64_t blocks) {
  error_text[0] = 0;
  if (blocks == 0) return Status::kOk;
  if (blocks > kMostBlocks) return fail(Status::kBadArgument, "too many blocks for one launch");
  if (!phase.covers(execution)) {
    Batch batch(launch);
    batch.add(launch, record, blocks);
    return batch.start(execution);
  }
  Batch* batch = nullptr;
  for (const auto& waiting : phase.batches) {
    if (waiting->takes(launch)) batch = waiting.get();
  }
  if (batch == nullptr) {
    phase.batches.push_back(std::make_unique<Batch>(launch));
    batch = phase.batches.back().get();
  }
  Status status = Status::kOk;
  if (!batch->has_room(blocks)) status = batch->start(phase.execution);
  batch->add(launch, record, blocks);
  return status;
}

}  // namespace cuda
}  // namespace pymerge
