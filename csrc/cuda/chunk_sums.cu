#include "cuda/kernels_sums.h"

namespace pymerge {
namespace cuda {

namespace {

template <class Terms>
Kernel pick_terms(Kind kind) {
  return by_kind(kind.dtype, kind.mixed,
                 [](auto io) -> Kernel { return terms_kernel<decltype(io), Terms>; });
}

}  // namespace

Kernel sums_kernel(Kind kind, int num_models, SumsKind sums, bool ranks) {
  switch (sums) {
    case SumsKind::kSparse:
      return ranks ? pick_terms<SparseTerms<KeptByRank>>(kind)
                   : pick_terms<SparseTerms<KeptByKey<true, true>>>(kind);
    case SumsKind::kDots:
      return pick_terms<DotTerms>(kind);
    case SumsKind::kStatistics:
      return pick_terms<StatisticsTerms>(kind);
    case SumsKind::kRamCounts:
      return pick_terms<RamTerms>(kind);
    case SumsKind::kEmr:
      return pick_terms<EmrTerms>(kind);
    case SumsKind::kSce:
      return pick_terms<SceTerms>(kind);
    case SumsKind::kPcbExp:
      return exp_kernel_of(kind, num_models);
    default:
      return pairs_kernel_of(kind, num_models, sums);
  }
}

}  // namespace cuda
}  // namespace pymerge
