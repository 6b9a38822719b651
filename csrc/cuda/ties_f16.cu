#include "cuda/kernels_ties.h"

namespace pymerge {
namespace cuda {

Kernel ties_f16(int num_models, TiesForm form) { return pick_ties<F16>(num_models, form); }

}  // namespace cuda
}  // namespace pymerge
