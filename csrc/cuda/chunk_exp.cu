#include "cuda/kernels_sums.h"
#include "cuda/sum_terms.h"

namespace pymerge {
namespace cuda {

Kernel pcb_exp_sums(Kind kind, int num_models, bool) {
  return pick_pairs<ExpPairs, kUnrolledPoints>(kind, num_models);
}

}  // namespace cuda
}  // namespace pymerge
