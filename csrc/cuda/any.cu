#include "cuda/kernels_any.h"
#include "cuda/kernels_pointwise.h"
#include "cuda/kernels_rows.h"
#include "cuda/kernels_sparse.h"

namespace pymerge {
namespace cuda {

Kernel any_weighted_sum(bool wide) {
  return wide ? any_weighted_sum_kernel<double> : any_weighted_sum_kernel<float>;
}

Kernel any_ties(bool wide) { return wide ? any_ties_kernel<double> : any_ties_kernel<float>; }

Kernel sparse_kernel(Kind kind, int num_models, SparseForm form, bool elect) {
  switch (kind.mixed ? Dtype::kF64 : kind.dtype) {
    case Dtype::kBF16:
      return sparse_bf16(num_models, form, elect);
    case Dtype::kF16:
      return sparse_f16(num_models, form, elect);
    case Dtype::kF32:
      return sparse_f32(num_models, form, elect);
    default:
      return kind.dtype == Dtype::kF64 ? pick_sparse<Mixed<double>, 0>(num_models, form, elect)
                                       : pick_sparse<Mixed<float>, 0>(num_models, form, elect);
  }
}

Kernel pointwise_kernel(Kind kind, int num_models, Pointwise op) {
  switch (kind.mixed ? Dtype::kF64 : kind.dtype) {
    case Dtype::kBF16:
      return pointwise_bf16(num_models, op);
    case Dtype::kF16:
      return pointwise_f16(num_models, op);
    case Dtype::kF32:
      return pointwise_f32(num_models, op);
    default:
      return kind.dtype == Dtype::kF64 ? pick_pointwise<Mixed<double>, 0>(num_models, op)
                                       : pick_pointwise<Mixed<float>, 0>(num_models, op);
  }
}

Kernel row_sum_kernel_of(Kind kind) {
  return by_kind(kind.dtype, kind.mixed,
                 [](auto io) -> Kernel { return row_sum_kernel<decltype(io)>; });
}

}  // namespace cuda
}  // namespace pymerge
