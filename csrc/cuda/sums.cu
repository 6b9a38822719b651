#include "cuda/kernels_weighted_sum.h"

namespace pymerge {
namespace cuda {
namespace {

template <int kStreams>
struct FloorInstance {
  static Kernel kernel() { return floor_kernel<kStreams>; }
};

}  // namespace

Kernel weighted_sum_bf16(int num_models, bool has_base) {
  return pick_weighted_sum<Bf16>(num_models, has_base);
}

Kernel weighted_sum_f16(int num_models, bool has_base) {
  return pick_weighted_sum<F16>(num_models, has_base);
}

Kernel weighted_sum_f32(int num_models, bool has_base) {
  return pick_weighted_sum<F32>(num_models, has_base);
}

Kernel floor_of_streams(int num_streams) {
  return pick_instance<FloorInstance>(num_streams,
                                      std::make_integer_sequence<int, kFloorStreams>());
}

}  // namespace cuda
}  // namespace pymerge
