// Compiled once for each dtype: build.py defines PYMERGE_DTYPE, which is Bf16, F16 or F32.
#include "cuda/kernels_ties.h"

namespace pymerge {
namespace cuda {

template <class Io>
Kernel ties_of_dtype(int num_models, TiesForm form) {
  return pick_ties<Io>(num_models, form);
}

template Kernel ties_of_dtype<PYMERGE_DTYPE>(int, TiesForm);

}  // namespace cuda
}  // namespace pymerge
