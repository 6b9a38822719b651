// sparse_merge: the kernels of every form.
#pragma once

#include "cuda/kernels_points.h"
#include "cuda/sparse_points.h"

namespace pymerge {
namespace cuda {

template <class Io, int most, class Kept>
Kernel pick_sparse_kept(int num_models, bool elect) {
  return elect ? PointInstances<Io, SparsePoint<Kept, true>>::template pick<most>(num_models)
               : PointInstances<Io, SparsePoint<Kept, false>>::template pick<most>(num_models);
}

// Unrolled for up to `most` models in the forms where only one criterion decides what is kept.
template <class Io, int most>
Kernel pick_sparse(int num_models, SparseForm form, bool elect) {
  switch (form) {
    case SparseForm::kBand:
      return pick_sparse_kept<Io, most, KeptByKey<true, false>>(num_models, elect);
    case SparseForm::kDrawn:
      return pick_sparse_kept<Io, most, KeptByKey<false, true>>(num_models, elect);
    case SparseForm::kBoth:
      return pick_sparse_kept<Io, 0, KeptByKey<true, true>>(num_models, elect);
    case SparseForm::kRanks:
      return pick_sparse_kept<Io, 0, KeptByRank>(num_models, elect);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace pymerge
