// pointwise: the kernels of every op.
#pragma once

#include "cuda/kernels_points.h"
#include "cuda/pointwise_points.h"

namespace pymerge {
namespace cuda {

// Unrolled for up to `most` models, or up to as many as the kind takes.
template <class Io, int most>
Kernel pick_pointwise(int num_models, Pointwise op) {
  constexpr int K = most;
  switch (op) {
#define PM_POINTWISE(kind, name, reals, models)                                 \
  case Pointwise::kind:                                                         \
    return PointInstances<Io, PointwisePoint<Pointwise::kind>>::template pick<( \
        most < (models) ? most : (models))>(num_models);
#include "pointwise.def"
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace pymerge
