// pointwise: the kernels of every op.
#pragma once

#include "cuda/kernels_points.h"
#include "cuda/pointwise_points.h"

namespace pymerge {
namespace cuda {

// Unrolled for up to `most` models; nearswap has one.
template <class Io, int most>
Kernel pick_pointwise(int num_models, Pointwise op) {
  switch (op) {
    case Pointwise::kNearswap:
      return PointInstances<Io, PointwisePoint<Pointwise::kNearswap>>::template pick<(
          most < 1 ? most : 1)>(num_models);
    case Pointwise::kRam:
      return PointInstances<Io, PointwisePoint<Pointwise::kRam>>::template pick<most>(num_models);
    case Pointwise::kMagmax:
      return PointInstances<Io, PointwisePoint<Pointwise::kMagmax>>::template pick<most>(
          num_models);
    case Pointwise::kConsensus:
      return PointInstances<Io, PointwisePoint<Pointwise::kConsensus>>::template pick<most>(
          num_models);
    case Pointwise::kTall:
      return PointInstances<Io, PointwisePoint<Pointwise::kTall>>::template pick<most>(num_models);
    case Pointwise::kEmr:
      return PointInstances<Io, PointwisePoint<Pointwise::kEmr>>::template pick<most>(num_models);
    case Pointwise::kVariance:
      return PointInstances<Io, PointwisePoint<Pointwise::kVariance>>::template pick<most>(
          num_models);
    default:
      return PointInstances<Io, PointwisePoint<Pointwise::kSce>>::template pick<most>(num_models);
  }
}

}  // namespace cuda
}  // namespace pymerge
