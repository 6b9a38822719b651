#include "cuda/kernels_any.h"
#include "cuda/kernels_pointwise.h"
#include "cuda/kernels_rows.h"
#include "cuda/kernels_sparse.h"

namespace pymerge {
namespace cuda {

Kernel weighted_sum_kernel_of(Kind kind, int num_models, bool has_base) {
  if (kind.mixed || num_models > kUnrolledModels) {
    const bool wide = kind.dtype == Dtype::kF64;
    return wide ? any_weighted_sum_kernel<double> : any_weighted_sum_kernel<float>;
  }
  return by_dtype(kind.dtype, [&](auto io) -> Kernel {
    return weighted_sum_of_dtype<decltype(io)>(num_models, has_base);
  });
}

Kernel ties_kernel_of(Kind kind, int num_models, TiesForm form) {
  if (kind.mixed || num_models > kUnrolledModels) {
    return kind.dtype == Dtype::kF64 ? any_ties_kernel<double> : any_ties_kernel<float>;
  }
  return by_dtype(kind.dtype,
                  [&](auto io) -> Kernel { return ties_of_dtype<decltype(io)>(num_models, form); });
}

Kernel sparse_kernel_of(Kind kind, int num_models, SparseForm form, bool elect) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    if constexpr (Elements<Io>::kMixed) {
      return pick_sparse<Io, 0>(num_models, form, elect);
    } else {
      return sparse_of_dtype<Io>(num_models, form, elect);
    }
  });
}

Kernel pointwise_kernel_of(Kind kind, int num_models, Pointwise op) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    if constexpr (Elements<Io>::kMixed) {
      return pick_pointwise<Io, 0>(num_models, op);
    } else {
      return pointwise_of_dtype<Io>(num_models, op);
    }
  });
}

Kernel row_sum_kernel_of(Kind kind) {
  return by_kind(kind.dtype, kind.mixed,
                 [](auto io) -> Kernel { return row_sum_kernel<decltype(io)>; });
}

}  // namespace cuda
}  // namespace pymerge
