// Launches kernels, either at once or batched between begin and end. Host code.
#pragma once

#include "cuda/table.h"

namespace pymerge {
namespace cuda {

// What records need in common to share a launch: one kernel, one shape of record.
struct Launch {
  Kernel kernel;
  int32_t num_models;
  int32_t stride;        // bytes of a record
  int32_t shared_bytes;  // of dynamic shared memory
};

// The maximum size of a record in bytes.
constexpr int64_t kRecordBytes = sizeof(Table::records);

// Records why a call of this thread fails, and returns `status`.
Status fail(Status status, const char* why);
const char* last_error();

Status begin(const Execution* execution);
Status end(const Execution* execution);
Status check(const Execution* execution, Kernel kernel);

// Runs `blocks` blocks on a record, which starts with first_block.
Status run(const Execution& execution, const Launch& launch, const void* record, int64_t blocks);

}  // namespace cuda
}  // namespace pymerge
