#include "cuda/kernels_sums.h"
#include "cuda/sum_terms.h"

namespace pymerge {
namespace cuda {

Kernel gram_sums(Kind kind, int num_models, bool) {
  return pick_pairs<GramPairs, kUnrolledPoints>(kind, num_models);
}

Kernel pcb_extremes_sums(Kind kind, int num_models, bool) {
  return pick_pairs<ExtremePairs, kUnrolledPoints>(kind, num_models);
}

}  // namespace cuda
}  // namespace pymerge
