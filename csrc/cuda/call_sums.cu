// chunk_sums: converts arguments to records.
#include "cuda/calls.h"
#include "cuda/sparse_records.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int64_t kStretchesOfBlock = kThreads / 16;  // as in kernels_sums.h

const char* unfit_sums(const SumsArgs& args) {
  if (args.num_models < 1 || args.numel < 0 || args.columns < 0) return "num_models or numel";
  const SumsShape shape = sums_shape(args.kind, args.num_models);
  if (shape.rows < 1) return "num_models";
  if (args.num_reals != shape.reals) return "num_reals";
  const int64_t length = args.columns > 0 ? args.columns : kSumChunk;
  if (args.columns > 0 && args.numel % args.columns != 0) return "columns";
  if (args.num_chunks != (args.numel + length - 1) / length) return "num_chunks";
  if (shape.inputs != SumsInputs::kAny && args.base.data == nullptr) return "null argument";
  if (shape.inputs == SumsInputs::kFloatDeltas && args.compute == Dtype::kF64) return "compute";
  if (args.kind == SumsKind::kSparse) return unfit(args);
  return nullptr;
}

template <class AnyModel>
Status run_sums(const SumsArgs& args) {
  using AnyRecord = Record<RowsHead, AnyModel>;
  // The other kinds pass theirs as the record's scale.
  const int64_t numbers = args.kind == SumsKind::kPcbExp ? args.num_reals : 0;
  if (too_many<AnyRecord>(args.num_models, numbers * 4)) return refuse(kTooMany);
  AnyRecord record(args.num_models, numbers * 4);
  const Operands operands = record.set_operands(args, args.compute, nullptr);
  RowsHead& head = record.head();
  head.out = args.partials;
  head.stride = args.num_chunks;
  head.columns = args.columns;
  if (args.kind == SumsKind::kRamCounts || args.kind == SumsKind::kEmr) {
    record.set_scale(args.reals[0], 1.0);
  }
  if (args.kind == SumsKind::kSce) record.model(0).threshold = args.lo[0];
  if constexpr (!std::is_same_v<AnyModel, Model>) set_kept(args, record);
  if constexpr (std::is_same_v<AnyModel, RankedModel>) set_ranks(args, record);
  if (numbers > 0) record.set_numbers(args.reals, numbers, false);
  const Kernel kernel = sums_kernel_of(kind_of(operands, args.compute), args.num_models, args.kind,
                                       args.ranks != nullptr);
  return record.run_blocks(args.execution, kernel,
                           (args.num_chunks + kStretchesOfBlock - 1) / kStretchesOfBlock);
}

}  // namespace

Status chunk_sums(const SumsArgs* args) {
  if (!known(args->kind)) return Status::kUnknownKind;
  if (const char* why = unfit_sums(*args)) return refuse(why);
  if (args->kind != SumsKind::kSparse) return run_sums<Model>(*args);
  return args->ranks != nullptr ? run_sums<RankedModel>(*args) : run_sums<SparseModel>(*args);
}

}  // namespace cuda
}  // namespace pymerge
