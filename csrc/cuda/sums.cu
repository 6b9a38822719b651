#include "cuda/kernels_weighted_sum.h"

namespace pymerge {
namespace cuda {
namespace {

template <int kStreams>
struct FloorInstance {
  static Kernel kernel() { return floor_kernel<kStreams>; }
};

}  // namespace

template <class Io>
Kernel weighted_sum_of_dtype(int num_models, bool has_base) {
  return pick_weighted_sum<Io>(num_models, has_base);
}

template Kernel weighted_sum_of_dtype<Bf16>(int, bool);
template Kernel weighted_sum_of_dtype<F16>(int, bool);
template Kernel weighted_sum_of_dtype<F32>(int, bool);

Kernel floor_of_streams(int num_streams) {
  return pick_instance<FloorInstance>(num_streams,
                                      std::make_integer_sequence<int, kFloorStreams>());
}

}  // namespace cuda
}  // namespace pymerge
