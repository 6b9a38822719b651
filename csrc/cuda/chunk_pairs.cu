#include "cuda/kernels_sums.h"

namespace pymerge {
namespace cuda {

Kernel pairs_kernel_of(Kind kind, int num_models, SumsKind sums) {
  return sums == SumsKind::kGram ? pick_pairs<GramPairs, kUnrolledPoints>(kind, num_models)
                                 : pick_pairs<ExtremePairs, kUnrolledPoints>(kind, num_models);
}

}  // namespace cuda
}  // namespace pymerge
