#include "cuda/kernels_ties.h"

namespace pymerge {
namespace cuda {

Kernel ties_bf16(int num_models, TiesForm form) { return pick_ties<Bf16>(num_models, form); }

}  // namespace cuda
}  // namespace pymerge
