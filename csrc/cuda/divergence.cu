#include "cuda/kernels_divergence.h"

namespace pymerge {
namespace cuda {

Kernel divergence_kernel_of(Kind kind, Divergence divergence) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    switch (divergence) {
      case Divergence::kMaxima:
        return divergence_kernel<Io, LargestOfRow, 0>;
      case Divergence::kExp:
        return divergence_kernel<Io, ExpOfRow, 2>;
      default:
        return divergence_kernel<Io, DivergenceOfRow, 4>;
    }
  });
}

Kernel importance_kernel_of(Kind kind, bool merge) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    return merge ? importance_kernel<Io, true> : importance_kernel<Io, false>;
  });
}

}  // namespace cuda
}  // namespace pymerge
