#include "cuda/kernels_divergence.h"

namespace pymerge {
namespace cuda {

namespace {

template <class Io, class Terms, Divergence kStep>
Kernel step_kernel() {
  constexpr DivergenceRows rows = divergence_rows(kStep);
  static_assert(rows.count == Terms::kSlots, "a sum for each row");
  return divergence_kernel<Io, Terms, rows.first>;
}

}  // namespace

Kernel divergence_kernel_of(Kind kind, Divergence step) {
  return by_kind(kind.dtype, kind.mixed, [&](auto io) -> Kernel {
    using Io = decltype(io);
    switch (step) {
      case Divergence::kMaxima:
        return step_kernel<Io, LargestOfRow, Divergence::kMaxima>();
      case Divergence::kExp:
        return step_kernel<Io, ExpOfRow, Divergence::kExp>();
      case Divergence::kDivergence:
        return step_kernel<Io, DivergenceOfRow, Divergence::kDivergence>();
      case Divergence::kAll:
        break;  // one step after the other
    }
    return nullptr;
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
