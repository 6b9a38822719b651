// packed: converts arguments to records, and chooses kernels.
#include "cuda/calls.h"
#include "cuda/kernels_packed.h"
#include "cuda/record.h"

namespace pymerge {
namespace cuda {
namespace {

using PackedRecord = Record<PackedHead, PackedModel>;

Kernel packed_kernel_of(Kind kind, bool dots) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    return dots ? packed_dots_kernel<Io> : packed_sum_kernel<Io>;
  });
}

const char* unfit_packed(const PackedArgs& args, bool dots) {
  if (args.num_models < 1 || args.numel < 0) return "num_models or numel";
  if (args.num_chunks != (args.numel + kSumChunk - 1) / kSumChunk) return "num_chunks";
  if (args.base.data == nullptr || args.masks == nullptr || args.offsets == nullptr) {
    return "null argument";
  }
  if (dots ? args.gradient.data == nullptr : args.weights == nullptr) return "null argument";
  if (dots == (args.out.data != nullptr)) return "out or partials";
  return too_many<PackedRecord>(args.num_models) ? kTooMany : nullptr;
}

}  // namespace

Status packed(const PackedArgs* args) {
  const bool dots = args->partials != nullptr;
  if (const char* why = unfit_packed(*args, dots)) return refuse(why);
  PackedRecord record(args->num_models);
  // The values may have any address; the operands as long as the tensor are accessed 16 bytes at a
  // time.
  Operands whole(args->base.dtype, args->compute);
  whole.add(args->base.data, args->base.dtype);
  if (dots) whole.add(args->gradient.data, args->gradient.dtype);
  if (!dots) whole.add(args->out.data, args->out.dtype);
  Operands all = whole;
  for (int k = 0; k < args->num_models; ++k) {
    const Operand& kept = args->models[k];
    all.add(kept.data, kept.dtype);
    PackedModel& model = record.model(k);
    model.data = kept.data;
    model.dtype = static_cast<int32_t>(kept.dtype);
    model.mask = args->masks[k];
    model.offsets = args->offsets[k];
    if (!dots) record.set_weight(k, args->weights[k]);
  }
  PackedHead& head = record.head();
  head.flags = whole.flags();
  head.numel = args->numel;
  head.base = args->base.data;
  head.base_dtype = static_cast<int32_t>(args->base.dtype);
  head.gradient = args->gradient.data;
  head.gradient_dtype = static_cast<int32_t>(args->gradient.dtype);
  head.stride = args->num_chunks;
  head.out = dots ? static_cast<void*>(args->partials) : args->out.data;
  head.out_dtype = static_cast<int32_t>(args->out.dtype);
  const Kernel kernel = packed_kernel_of(kind_of(all, args->compute), dots);
  if (!dots) return record.run_tiles(args->execution, kernel);
  return record.run_blocks(args->execution, kernel,
                           (args->num_chunks + kStretches - 1) / kStretches);
}

}  // namespace cuda
}  // namespace pymerge
