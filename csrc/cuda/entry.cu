// The table of the CUDA library: turns arguments into records, and chooses kernels.
#include <cmath>

#include "cuda/calls.h"
#include "cuda/record.h"

namespace pymerge {
namespace cuda {
namespace {

constexpr int32_t kInfinityKey = 0x7f800000;
constexpr int kSharedBins = 1 << 13;  // a larger number of bins is counted in device memory
constexpr int kModelsAtOnce = 64;     // in a record of the counting kernels

using Elementwise = Record<Head, Model>;

Status weighted_sum(const WeightedSumArgs* args) {
  const int count = args->num_models;
  if (count < 1 || args->numel < 0) return refuse("num_models or numel");
  if (args->nonfinite == nullptr || args->weights == nullptr) return refuse("null argument");
  if (too_many<Elementwise>(count)) return refuse(kTooMany);
  const bool has_base = args->base.data != nullptr;
  Elementwise record(count);
  const Operands operands = record.set_operands(*args, args->compute, &args->out);
  for (int k = 0; k < count; ++k) record.set_weight(k, args->weights[k]);
  record.set_scale(args->scale, args->divisor);
  record.head().stats = args->nonfinite;
  return record.run_tiles(
      args->execution, weighted_sum_kernel_of(kind_of(operands, args->compute), count, has_base));
}

Status streaming_floor(const WeightedSumArgs* args) {
  const bool has_base = args->base.data != nullptr;
  const int count = args->num_models + (has_base ? 1 : 0);
  if (args->num_models < 1 || args->numel < 0) return refuse("num_models or numel");
  if (count > kFloorStreams) return refuse("more streams than the floor reads");
  Operands operands(args->out.dtype, Dtype::kF32);
  operands.add(args->out.data, args->out.dtype);
  Elementwise record(count);
  for (int i = 0; i < count; ++i) {
    const Operand& operand = !has_base ? args->models[i]
                             : i == 0  ? args->base
                                       : args->models[i - 1];
    operands.add(operand.data, operand.dtype);
    record.model(i) = {operand.data, 0, 0, 0, static_cast<int32_t>(operand.dtype)};
  }
  if (!operands.uniform) return refuse("the floor takes one dtype of 16 or 32 bits");
  record.head().flags = operands.flags();
  record.head().numel = args->numel * (dtype_bytes(operands.dtype) / 2);
  record.head().out = args->out.data;
  return record.run_tiles(args->execution, floor_of_streams(count));
}

// The form of a call that the kernels of one dtype can handle.
TiesForm form_of(const TiesArgs& args) {
  const bool weighted = args.weighting != Weighting::kNone;
  const bool signs = args.want_signs != 0;
  const bool mean_as_usual =
      args.merge == (weighted ? TiesMerge::kMeanOfWeights : TiesMerge::kMeanOfCount);
  const float scale = static_cast<float>(args.scale);
  bool finite = (mean_as_usual || args.merge == TiesMerge::kSum) && args.zero_sign != 0 &&
                args.elect_count == 0 && args.weighting != Weighting::kAfter &&
                !(weighted && signs) && scale != 0 && std::isfinite(scale);
  for (int k = 0; k < args.num_models; ++k) {
    finite = finite && args.thresholds[k] <= kInfinityKey;
  }
  if (!finite) return TiesForm::kCareful;
  return weighted ? TiesForm::kWeighted : signs ? TiesForm::kSigns : TiesForm::kPlain;
}

int32_t ties_flags(const TiesArgs& args) {
  const bool by_weights = args.merge == TiesMerge::kMeanOfWeights;
  return (by_weights || args.merge == TiesMerge::kMeanOfCount ? kDivide : 0) |
         (by_weights ? kDivideByWeights : 0) |
         (args.weighting == Weighting::kBefore ? kWeighBefore : 0) |
         (args.weighting == Weighting::kAfter ? kWeighAfter : 0) |
         (args.merge == TiesMerge::kMax ? kLargest : 0) |
         (args.elect_count != 0 ? kElectCount : 0) | (args.want_signs != 0 ? kWantSigns : 0);
}

Status ties(const TiesArgs* args) {
  const int count = args->num_models;
  if (count < 1 || args->numel < 0) return refuse("num_models or numel");
  if (args->base.data == nullptr || args->stats == nullptr) return refuse("null argument");
  if (args->weighting != Weighting::kNone && args->weights == nullptr) return refuse("no weights");
  if (too_many<Elementwise>(count)) return refuse(kTooMany);
  const bool wide = args->compute == Dtype::kF64;
  Elementwise record(count);
  const Operands operands =
      record.set_operands(*args, args->compute, args->out.data != nullptr ? &args->out : nullptr);
  for (int k = 0; k < count; ++k) {
    int64_t threshold = args->thresholds[k];
    if (!wide && threshold > INT32_MAX) threshold = INT32_MAX;
    // Thresholds 0 and 1 keep the same elements, and ties_point_finite needs 1.
    record.model(k).threshold = threshold < 1 ? 1 : threshold;
    record.set_weight(k, args->weights != nullptr ? args->weights[k] : 1.0);
  }
  record.set_scale(args->scale, 1.0);
  record.head().flags |= ties_flags(*args);
  record.head().stats = args->stats;
  record.head().zero_sign = args->zero_sign;
  return record.run_tiles(args->execution,
                          ties_kernel_of(kind_of(operands, args->compute), count, form_of(*args)));
}

using Magnitudes = Record<MagnitudeHead, MagnitudeModel>;

Status run_magnitudes(const Execution& execution, Dtype compute, const Operands& operands,
                      Magnitudes& record, Bins bins) {
  const MagnitudeHead& head = record.head();
  const int64_t chunks = (head.numel + head.chunk - 1) / head.chunk;
  const int32_t bytes = bins == Bins::kShared ? head.num_bins * 4 : 0;
  return record.run_blocks(execution, magnitudes(kind_of(operands, compute), bins),
                           chunks * record.num_models(), bytes);
}

// Sets the bracket of model k; returns false if it is not valid.
bool set_bracket(const HistogramArgs& args, int k, MagnitudeModel& model) {
  const int64_t largest = args.compute == Dtype::kF64 ? INT64_MAX : INT32_MAX;
  const int64_t lo = args.lo[k], shift = args.shift[k];
  if (lo < 0 || lo > largest || shift < 0 || shift >= (largest == INT32_MAX ? 32 : 64))
    return false;
  const bool fits = args.num_bins <= ((largest - lo) >> shift);
  model.lo = lo;
  model.hi = fits ? lo + (args.num_bins << shift) - 1 : largest;
  model.hot = args.hot[k] > largest ? -1 : args.hot[k];
  model.shift = static_cast<int32_t>(shift);
  return true;
}

Status magnitude_histogram(const HistogramArgs* args) {
  if (args->num_models < 1 || args->num_slots < 1 || args->numel < 0 || args->numel > INT32_MAX) {
    return refuse("num_models, num_slots or numel");
  }
  if (args->num_bins < 1 || args->num_bins > INT32_MAX - 3) return refuse("num_bins");
  if (args->base.data == nullptr || args->counts == nullptr) return refuse("null argument");
  if (args->hot_chunks != nullptr && args->num_chunks * kHotChunk < args->numel) {
    return refuse("num_chunks");
  }
  const Bins bins = args->num_bins <= kSharedBins ? Bins::kShared : Bins::kDevice;
  for (int first = 0; first < args->num_models; first += kModelsAtOnce) {
    const int left = args->num_models - first;
    const int count = left < kModelsAtOnce ? left : kModelsAtOnce;
    Operands operands(args->base.dtype, args->compute);
    operands.add(args->base.data, args->base.dtype);
    Magnitudes record(count);
    for (int i = 0; i < count; ++i) {
      const int k = first + i;
      MagnitudeModel& model = record.model(i);
      if (!set_bracket(*args, k, model)) return refuse("lo or shift");
      operands.add(args->models[k].data, args->models[k].dtype);
      model.data = args->models[k].data;
      model.counts = args->counts + k * (args->num_bins + 3);
      model.hot_chunks =
          args->hot_chunks == nullptr ? nullptr : args->hot_chunks + k * args->num_chunks;
      model.dtype = static_cast<int32_t>(args->models[k].dtype);
    }
    MagnitudeHead& head = record.head();
    head.num_bins = static_cast<int32_t>(args->num_bins);
    head.numel = args->numel;
    head.chunk = kHotChunk;
    head.base = args->base.data;
    head.base_dtype = static_cast<int32_t>(args->base.dtype);
    const Status status = run_magnitudes(args->execution, args->compute, operands, record, bins);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

Status magnitude_equal_counts(const EqualCountsArgs* args) {
  const int64_t largest = args->compute == Dtype::kF64 ? INT64_MAX : INT32_MAX;
  if (args->chunk < 1 || args->numel < 0) return refuse("chunk or numel");
  if (args->key < 0 || args->key > largest) return refuse("key");
  if (args->base.data == nullptr) return refuse("null argument");
  Operands operands(args->base.dtype, args->compute);
  operands.add(args->base.data, args->base.dtype);
  operands.add(args->model.data, args->model.dtype);
  Magnitudes record(1);
  MagnitudeModel& model = record.model(0);
  model.data = args->model.data;
  model.hot = args->key;
  model.hot_chunks64 = args->counts;
  model.dtype = static_cast<int32_t>(args->model.dtype);
  MagnitudeHead& head = record.head();
  head.numel = args->numel;
  head.chunk = args->chunk < args->numel ? args->chunk : args->numel > 0 ? args->numel : 1;
  head.base = args->base.data;
  head.base_dtype = static_cast<int32_t>(args->base.dtype);
  return run_magnitudes(args->execution, args->compute, operands, record, Bins::kNone);
}

Status check_device(const Execution* execution) { return check(execution, floor_of_streams(1)); }

KernelTable make_table() {
  KernelTable table{};
  table.abi = kAbi;
  table.name = "cuda";
  table.weighted_sum = weighted_sum;
  table.ties = ties;
  table.magnitude_histogram = magnitude_histogram;
  table.magnitude_equal_counts = magnitude_equal_counts;
  table.streaming_floor = streaming_floor;
  table.begin = begin;
  table.end = end;
  table.check = check_device;
  table.last_error = last_error;
  table.sparse_merge = sparse_merge;
  table.pointwise = pointwise;
  table.chunk_sums = chunk_sums;
  table.pcb = pcb;
  table.packed = packed;
  table.row_weighted_sum = row_weighted_sum;
  table.divergence_sums = divergence_sums;
  table.row_importance = row_importance;
  return table;
}

}  // namespace
}  // namespace cuda
}  // namespace pymerge

extern "C" __attribute__((visibility("default"))) const pymerge::KernelTable* pymerge_cuda_table() {
  static const pymerge::KernelTable table = pymerge::cuda::make_table();
  return &table;
}
