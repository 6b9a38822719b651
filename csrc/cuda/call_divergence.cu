// Divergences of rows and their use as weights: converts arguments to records.
#include "cuda/calls.h"
#include "cuda/record.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int64_t kStretchesOfBlock = kThreads / 16;  // as in kernels_sums.h

}  // namespace

Status divergence_sums(const DivergenceArgs* args) {
  if (!known(args->kind)) return Status::kUnknownKind;
  if (args->num_models != 1 || args->numel < 0 || args->columns < 0) {
    return refuse("num_models or numel");
  }
  const int64_t length = args->columns > 0 ? args->columns : kSumChunk;
  if (args->columns > 0 && args->numel % args->columns != 0) return refuse("columns");
  if (args->num_chunks != (args->numel + length - 1) / length) return refuse("num_chunks");
  if (args->numel == 0) return Status::kOk;  // an empty tensor has no address
  if (args->base.data == nullptr || args->table == nullptr) return refuse("null argument");
  Record<RowsHead, Model> record(1);
  const Operands operands = record.set_operands(*args, args->compute, nullptr);
  record.head().out = args->table;
  record.head().stride = args->num_chunks;
  record.head().columns = args->columns;
  for (const Divergence step : kDivergenceSteps) {
    if (args->kind != step && args->kind != Divergence::kAll) continue;
    const Kernel kernel = divergence_kernel_of(kind_of(operands, args->compute), step);
    const Status status = record.run_blocks(
        args->execution, kernel, (args->num_chunks + kStretchesOfBlock - 1) / kStretchesOfBlock);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

Status row_importance(const ImportanceArgs* args) {
  if (args->num_models != 1 || args->numel < 0) return refuse("num_models or numel");
  if (args->columns < 1 || args->numel % args->columns != 0) return refuse("columns");
  if (args->numel == 0) return Status::kOk;  // an empty tensor has no address
  if (args->base.data == nullptr || args->out.data == nullptr || args->divergences == nullptr) {
    return refuse("null argument");
  }
  Record<RowSumHead, Model> record(1);
  const Operands operands = record.set_operands(*args, args->compute, &args->out);
  record.set_scale(args->threshold, 1.0);
  record.head().stats = args->nonfinite;
  record.head().columns = args->columns;
  record.head().stride = args->numel / args->columns;
  record.head().weights = args->divergences;
  return record.run_tiles(args->execution,
                          importance_kernel_of(kind_of(operands, args->compute), args->merge != 0));
}

}  // namespace cuda
}  // namespace pymerge
