// Kernels that weigh elements by the divergences of their rows: importances, and the merge that
// takes the elements of sufficient importance.
#pragma once

#include "cpu/elementwise.h"

namespace pymerge {
namespace {

struct ImportanceContext {
  const ImportanceArgs* args;
  int32_t failed, nonfinite;
};

template <class V>
bool importances_of(const ImportanceArgs& args, int64_t begin, int64_t end, bool* nonfinite) {
  using Key = typename KeyOf<V>::Type;
  char* memory = static_cast<char*>(thread_workspace(6 * kBlock * 8));
  if (memory == nullptr) return false;
  V* base = reinterpret_cast<V*>(memory);
  V* own = base + kBlock;
  V* result = own + kBlock;
  char* raw = reinterpret_cast<char*>(result + kBlock);
  char* scratch = raw + kBlock * 8;
  double* weights = reinterpret_cast<double*>(scratch + kBlock * 8);
  const V threshold = static_cast<V>(args.threshold);
  int64_t row = begin / args.columns, left = args.columns - begin % args.columns;
  Key worst = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const int padded = (n + kStep - 1) / kStep * kStep;
    widen_part(args.base, at, n, padded, base, raw, scratch);
    widen_part(args.models[0], at, n, padded, own, raw, scratch);
    for (int done = 0; done < n;) {
      const int here = left < n - done ? static_cast<int>(left) : n - done;
      for (int i = 0; i < here; ++i) weights[done + i] = args.divergences[row];
      done += here;
      left -= here;
      if (left == 0) {
        ++row;
        left = args.columns;
      }
    }
    for (int i = n; i < padded; ++i) weights[i] = 0;
    for (int i = 0; i < padded; ++i) {
      const V delta = own[i] - base[i];
      const V size = sizeof(V) == 8 ? static_cast<V>(__builtin_fabs(delta))
                                    : static_cast<V>(__builtin_fabsf(static_cast<float>(delta)));
      result[i] = static_cast<V>(static_cast<double>(size) * weights[i]);
    }
    if (args.merge != 0) {
      for (int i = 0; i < padded; ++i) {
        const V moved = base[i] + (own[i] - base[i]);
        result[i] = result[i] >= threshold ? moved : base[i];
      }
    }
    for (int i = 0; i < padded; ++i) {
      const Key first = scalar_key(base[i]), second = scalar_key(own[i]);
      const Key larger = first > second ? first : second;
      worst = larger > worst ? larger : worst;
    }
    if constexpr (sizeof(V) == 8) {
      narrow(result, padded, args.out.dtype, raw, reinterpret_cast<float*>(scratch));
    } else {
      narrow(result, padded, args.out.dtype, raw);
    }
    const int bytes = dtype_bytes(args.out.dtype);
    std::memcpy(static_cast<char*>(args.out.data) + at * bytes, raw,
                static_cast<size_t>(n) * bytes);
  }
  *nonfinite = worst >= KeyOf<V>::kInfinity;
  return true;
}

void importance_range(void* opaque, int64_t begin, int64_t end, int) {
  auto& context = *static_cast<ImportanceContext*>(opaque);
  bool nonfinite = false;
  const bool done = context.args->compute == Dtype::kF64
                        ? importances_of<double>(*context.args, begin, end, &nonfinite)
                        : importances_of<float>(*context.args, begin, end, &nonfinite);
  if (!done) set_flag(&context.failed);
  if (nonfinite) set_flag(&context.nonfinite);
}

Status row_importance(const ImportanceArgs* args) {
  if (args->num_models != 1 || args->numel < 0 || args->columns < 1 ||
      args->numel % args->columns != 0 || args->base.data == nullptr || args->out.data == nullptr) {
    return Status::kBadArgument;
  }
  ImportanceContext context{args, 0, 0};
  parallel_ranges(args->numel, kGrain, args->execution.num_threads, importance_range, &context);
  if (context.failed) return Status::kOutOfMemory;
  *args->nonfinite += context.nonfinite;
  return Status::kOk;
}

}  // namespace
}  // namespace pymerge
