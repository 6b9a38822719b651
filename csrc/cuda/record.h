// Records of a launch under construction. Host code.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace pymerge {
namespace cuda {

inline int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2;
}

inline Status refuse(const char* why) { return fail(Status::kBadArgument, why); }

// The common properties of a call's operands.
struct Operands {
  Dtype dtype;
  bool uniform;      // one dtype, all at multiples of its size, arithmetic in float
  uintptr_t places;  // all addresses, or-ed

  Operands(Dtype dtype, Dtype compute)
      : dtype(dtype), uniform(compute == Dtype::kF32 && dtype != Dtype::kF64), places(0) {}
  void add(const void* data, Dtype other) {
    places |= reinterpret_cast<uintptr_t>(data);
    uniform = uniform && other == dtype && places % dtype_bytes(dtype) == 0;
  }
  int32_t flags() const { return (places % 16 == 0 ? kAligned : 0) | (uniform ? kUniform : 0); }
};

// Chooses the kernels that can handle the operands of a call.
inline Kind kind_of(const Operands& operands, Dtype compute) {
  const Dtype mixed = compute == Dtype::kF64 ? compute : Dtype::kF32;
  return {operands.uniform ? operands.dtype : mixed, !operands.uniform};
}

// A head, the models, and then the bytes of numbers.
template <class AnyHead, class AnyModel>
class Record {
 public:
  explicit Record(int num_models, int64_t bytes_of_numbers = 0)
      : num_models_(num_models), bytes_(size_of(num_models, bytes_of_numbers)) {}
  // In 64 bits: the requested size may be too large.
  static int64_t size_of(int64_t num_models, int64_t bytes_of_numbers = 0) {
    const int64_t bytes = sizeof(AnyHead) + sizeof(AnyModel) * num_models + bytes_of_numbers;
    return (bytes + 15) / 16 * 16;
  }
  AnyHead& head() { return *reinterpret_cast<AnyHead*>(bytes_.data()); }
  AnyModel& model(int k) { return reinterpret_cast<AnyModel*>(&head() + 1)[k]; }
  int num_models() const { return num_models_; }
  const void* data() const { return bytes_.data(); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }

  // The numbers after the models, in the precision of the kernel: float or double.
  template <class Number>
  void set_numbers(const Number* numbers, int64_t count, bool wide) {
    char* to = reinterpret_cast<char*>(&model(num_models_));
    for (int64_t i = 0; i < count; ++i) {
      const double whole = numbers[i];
      const float single = static_cast<float>(whole);
      std::memcpy(to + i * (wide ? 8 : 4), wide ? static_cast<const void*>(&whole) : &single,
                  wide ? 8 : 4);
    }
  }

  // Adds what most calls have: base, models and an output with as many elements. `out` may be
  // missing. Returns the common properties of the operands.
  template <class Args>
  Operands set_operands(const Args& args, Dtype compute, const MutableOperand* out) {
    const Dtype first = args.models[0].dtype;
    Operands operands(first, compute);
    if (args.base.data != nullptr) operands.add(args.base.data, args.base.dtype);
    for (int k = 0; k < num_models_; ++k) {
      operands.add(args.models[k].data, args.models[k].dtype);
      model(k).data = args.models[k].data;
      model(k).dtype = static_cast<int32_t>(args.models[k].dtype);
    }
    if (out != nullptr) {
      operands.add(out->data, out->dtype);
      head().out = out->data;
      head().out_dtype = static_cast<int32_t>(out->dtype);
    }
    head().flags = operands.flags();
    head().numel = args.numel;
    head().base = args.base.data;
    head().base_dtype = static_cast<int32_t>(args.base.dtype);
    return operands;
  }
  void set_weight(int k, double weight) {
    model(k).weight = weight;
    model(k).weight32 = static_cast<float>(weight);
  }
  void set_scale(double scale, double divisor) {
    head().scale = scale;
    head().divisor = divisor;
    head().scale32 = static_cast<float>(scale);
    head().divisor32 = static_cast<float>(divisor);
    if (divisor != 1.0) head().flags |= kDivide;
  }

  // Runs a kernel with one block for each tile, or with the given number of blocks.
  Status run_tiles(const Execution& execution, Kernel kernel) {
    return run_blocks(execution, kernel, (head().numel + kTile - 1) / kTile);
  }
  Status run_blocks(const Execution& execution, Kernel kernel, int64_t blocks,
                    int32_t shared_bytes = 0) {
    const Launch launch{kernel, num_models_, static_cast<int32_t>(size()), shared_bytes};
    return run(execution, launch, data(), blocks);
  }

 private:
  int num_models_;
  std::vector<char> bytes_;
};

// Whether a call has so many models that its record does not fit in a launch.
template <class AnyRecord>
bool too_many(int64_t num_models, int64_t bytes_of_numbers = 0) {
  return AnyRecord::size_of(num_models, bytes_of_numbers) > kRecordBytes;
}

constexpr const char* kTooMany = "more models than a launch can take";

}  // namespace cuda
}  // namespace pymerge
