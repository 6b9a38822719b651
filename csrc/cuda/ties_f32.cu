#include "cuda/kernels_ties.h"

namespace pymerge {
namespace cuda {

Kernel ties_f32(int num_models, TiesForm form) { return pick_ties<F32>(num_models, form); }

}  // namespace cuda
}  // namespace pymerge
