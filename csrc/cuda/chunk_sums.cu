// Chooses the kernel for a kind of sums. Those over pairs of models have separate files.
#include "cuda/kernels_sums.h"
#include "cuda/sparse_points.h"
#include "cuda/sum_terms.h"

namespace pymerge {
namespace cuda {

namespace {

template <class Terms>
Kernel pick_terms(Kind kind) {
  return by_kind(kind.dtype, kind.mixed,
                 [](auto io) -> Kernel { return terms_kernel<decltype(io), Terms>; });
}

}  // namespace

Kernel sparse_sums(Kind kind, int, bool ranks) {
  return ranks ? pick_terms<SparseTerms<KeptByRank>>(kind)
               : pick_terms<SparseTerms<KeptByKey<true, true>>>(kind);
}

Kernel dots_sums(Kind kind, int, bool) { return pick_terms<DotTerms>(kind); }
Kernel statistics_sums(Kind kind, int, bool) { return pick_terms<StatisticsTerms>(kind); }
Kernel ram_counts_sums(Kind kind, int, bool) { return pick_terms<RamTerms>(kind); }
Kernel emr_sums(Kind kind, int, bool) { return pick_terms<EmrTerms>(kind); }
Kernel sce_sums(Kind kind, int, bool) { return pick_terms<SceTerms>(kind); }

Kernel sums_kernel_of(Kind kind, int num_models, SumsKind sums, bool ranks) {
  switch (sums) {
#define PM_SUMS(of_kind, name, rows, reals, inputs) \
  case SumsKind::of_kind:                           \
    return name##_sums(kind, num_models, ranks);
#include "sums.def"
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace pymerge
