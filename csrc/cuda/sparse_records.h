// Adds to a record what a sparse merge keeps of each model. Host code.
#pragma once

#include "cuda/record.h"

namespace pymerge {
namespace cuda {

// lo .. last, as unsigned numbers: lo and the distance to last.
inline void set_band(SparseModel& model, int64_t lo, int64_t last, bool wide) {
  const int64_t largest = wide ? INT64_MAX : INT32_MAX;
  if (lo < 0) lo = 0;
  if (last > largest) last = largest;
  if (lo > largest || lo > last) {  // nothing: no key is that large
    model.threshold = wide ? INT64_MIN : static_cast<int64_t>(INT32_MIN);
    model.span = 0;
    return;
  }
  model.threshold = lo;
  model.span = static_cast<uint64_t>(last - lo);
}

// Args: SparseArgs or SumsArgs.
template <class Args, class AnyRecord>
void set_kept(const Args& args, AnyRecord& record) {
  const bool drawn = args.seeds != nullptr, chances = args.chances != nullptr;
  for (int k = 0; k < args.num_models; ++k) {
    SparseModel& model = record.model(k);
    set_band(model, args.lo[k], args.last[k], args.compute == Dtype::kF64);
    model.first = drawn ? static_cast<uint32_t>(args.seeds[2 * k]) : 0;
    model.slope = drawn ? static_cast<uint32_t>(args.seeds[2 * k + 1]) | 1u : 0;
    model.limit = drawn && !chances ? static_cast<uint32_t>(args.limits[k]) : UINT32_MAX;
  }
  record.head().start = static_cast<uint32_t>(args.start);
  if (chances) record.head().flags |= kChances;
}

// The same by ranks.
template <class Args, class AnyRecord>
void set_ranks(const Args& args, AnyRecord& record) {
  for (int k = 0; k < args.num_models; ++k) {
    RankedModel& model = record.model(k);
    model.ranks = args.ranks + k * args.rank_stride;
    model.chance = args.chances != nullptr ? args.chances[2 * k] : 0.0;
    model.spread = args.chances != nullptr ? args.chances[2 * k + 1] : 0.0;
    model.chance32 = static_cast<float>(model.chance);
    model.spread32 = static_cast<float>(model.spread);
  }
}

// Returns why a call's selection is invalid, or null.
template <class Args>
const char* unfit(const Args& args) {
  if (args.start < 0) return "start";
  // The hash uses the low half of an index; the caller mixes in the high one.
  const int64_t last = args.start + args.numel - 1;
  if (args.seeds != nullptr && args.numel > 0 && last >> 32 != args.start >> 32) return "start";
  if (args.ranks == nullptr) return nullptr;
  if (args.rank_stride < args.numel) return "rank_stride";
  return args.chances != nullptr && args.seeds == nullptr ? "chances need seeds" : nullptr;
}

}  // namespace cuda
}  // namespace pymerge
