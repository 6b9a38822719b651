#include "cuda/kernels_pcb.h"

namespace pymerge {
namespace cuda {

Kernel pcb_kernel_of(int num_models, int32_t variant, bool merge) {
  switch (static_cast<PcbVariant>(variant)) {
    case PcbVariant::kRoot:
      return pick_pcb<PcbVariant::kRoot>(num_models, merge);
    case PcbVariant::kVision:
      return pick_pcb<PcbVariant::kVision>(num_models, merge);
    case PcbVariant::kVisionEs:
      return pick_pcb<PcbVariant::kVisionEs>(num_models, merge);
    case PcbVariant::kPaper:
      return pcb_paper(num_models, merge);
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace pymerge
