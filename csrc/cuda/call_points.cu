// sparse_merge, pointwise, pcb and row_weighted_sum: converts arguments to records, chooses
// kernels.
#include "cuda/calls.h"
#include "cuda/sparse_records.h"
#include "math/pcb.h"

namespace pymerge {
namespace cuda {
namespace {

// Returns why a call is invalid, or null; does not check whether its models fit.
template <class Args>
const char* unfit_call(const Args& args) {
  if (args.num_models < 1 || args.numel < 0) return "num_models or numel";
  if (args.nonfinite == nullptr) return "null argument";
  return nullptr;
}

// Bands alone, hashes alone, or both. kBoth is slow, but rare: it takes a model that keeps nothing.
SparseForm form_of(const SparseArgs& args) {
  if (args.ranks != nullptr) return SparseForm::kRanks;
  if (args.seeds == nullptr) return SparseForm::kBand;
  const int64_t largest = args.compute == Dtype::kF64 ? INT64_MAX : INT32_MAX;
  bool band = false;
  for (int k = 0; k < args.num_models; ++k) {
    band = band || args.lo[k] > 0 || args.last[k] < largest;
  }
  return band ? SparseForm::kBoth : SparseForm::kDrawn;
}

template <class AnyModel>
Status merge_sparse(const SparseArgs& args) {
  using AnyRecord = Record<Head, AnyModel>;
  if (too_many<AnyRecord>(args.num_models)) return refuse(kTooMany);
  AnyRecord record(args.num_models);
  const Operands operands = record.set_operands(args, args.compute, &args.out);
  record.set_scale(args.scale, args.divisor);
  record.head().stats = args.nonfinite;
  record.head().flags |= (args.divide != 0 ? kDivideByWeights : 0) | (args.bare != 0 ? kBare : 0) |
                         (args.per_element != 0 ? kPerElement : 0);
  set_kept(args, record);
  if constexpr (std::is_same_v<AnyModel, RankedModel>) set_ranks(args, record);
  for (int k = 0; k < args.num_models; ++k) {
    record.set_weight(k, args.weights[k]);
    record.model(k).factor = args.factors[k];
    record.model(k).factor32 = static_cast<float>(args.factors[k]);
  }
  return record.run_tiles(args.execution,
                          sparse_kernel_of(kind_of(operands, args.compute), args.num_models,
                                           form_of(args), args.elect != 0));
}

}  // namespace

Status sparse_merge(const SparseArgs* args) {
  if (const char* why = unfit_call(*args)) return refuse(why);
  if (args->base.data == nullptr) return refuse("null argument");
  if (const char* why = unfit(*args)) return refuse(why);
  return args->ranks != nullptr ? merge_sparse<RankedModel>(*args)
                                : merge_sparse<SparseModel>(*args);
}

Status pointwise(const PointwiseArgs* args) {
  if (!known(args->op)) return Status::kUnknownKind;
  if (const char* why = unfit_call(*args)) return refuse(why);
  if (args->base.data == nullptr) return refuse("null argument");
  if (args->num_reals != pointwise_reals(args->op, args->num_models)) return refuse("num_reals");
  using AnyRecord = Record<Head, Model>;
  const bool wide = args->compute == Dtype::kF64;
  const int64_t bytes = static_cast<int64_t>(args->num_reals) * (wide ? 8 : 4);
  if (too_many<AnyRecord>(args->num_models, bytes)) return refuse(kTooMany);
  AnyRecord record(args->num_models, bytes);
  const Operands operands = record.set_operands(*args, args->compute, &args->out);
  record.set_numbers(args->reals, args->num_reals, wide);
  record.head().stats = args->nonfinite;
  return record.run_tiles(args->execution, pointwise_kernel_of(kind_of(operands, args->compute),
                                                               args->num_models, args->op));
}

Status pcb(const PcbArgs* args) {
  if (const char* why = unfit_call(*args)) return refuse(why);
  if (args->numel == 0) return Status::kOk;  // an empty tensor has no address
  const bool merge = args->scores == nullptr;
  if (args->base.data == nullptr || merge == (args->out.data == nullptr)) {
    return refuse("null argument");
  }
  if (args->variant < 0 || args->variant > 3) return refuse("variant");
  const auto variant = static_cast<PcbVariant>(args->variant);
  if (args->num_reals != pcb_reals(variant, args->num_models)) return refuse("num_reals");
  if (!merge && args->stride < args->numel) return refuse("stride");
  using AnyRecord = Record<RowsHead, Model>;
  const int64_t bytes = args->num_reals * 4;
  if (too_many<AnyRecord>(args->num_models, bytes)) return refuse(kTooMany);
  AnyRecord record(args->num_models, bytes);
  record.set_operands(*args, Dtype::kF32, merge ? &args->out : nullptr);
  record.set_numbers(args->reals, args->num_reals, false);
  record.head().stats = args->nonfinite;
  record.head().stride = args->stride;
  if (!merge) record.head().out = args->scores;
  return record.run_tiles(args->execution, pcb_kernel_of(args->num_models, args->variant, merge));
}

Status row_weighted_sum(const RowSumArgs* args) {
  if (const char* why = unfit_call(*args)) return refuse(why);
  if (args->columns < 1 || args->numel % args->columns != 0) return refuse("columns");
  if (args->out.data == nullptr) return refuse("null argument");
  using AnyRecord = Record<RowSumHead, Model>;
  if (too_many<AnyRecord>(args->num_models)) return refuse(kTooMany);
  AnyRecord record(args->num_models);
  const Operands operands = record.set_operands(*args, args->compute, &args->out);
  record.head().stats = args->nonfinite;
  record.head().columns = args->columns;
  record.head().stride = args->numel / args->columns;
  record.head().weights = args->weights;
  return record.run_tiles(args->execution, row_sum_kernel_of(kind_of(operands, args->compute)));
}

}  // namespace cuda
}  // namespace pymerge
