#include "cuda/kernels_pcb.h"

namespace pymerge {
namespace cuda {

Kernel pcb_paper(int num_models, bool merge) {
  return pick_pcb<PcbVariant::kPaper>(num_models, merge);
}

}  // namespace cuda
}  // namespace pymerge
