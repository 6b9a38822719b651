// pymerge._C: loads kernel tables and marshals. Pointers come as integers; the Python side has
// already validated everything (pymerge/backends/cpu.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/tables.h"
#include "cpu/thread_pool.h"
#include "kernel_table.h"

namespace py = pybind11;
using namespace pymerge;

namespace {

using Address = std::pair<uintptr_t, int32_t>;  // pointer, dtype

const KernelTable* active = nullptr;

const CpuVariant* find_variant(const std::string& name, CpuVariant* variants) {
  const int count = cpu_variants(variants);
  for (int i = count - 1; i >= 0; --i) {
    if (name == "auto" ? variants[i].supported : name == variants[i].name) return &variants[i];
  }
  return nullptr;
}

void use_isa(const std::string& name) {
  CpuVariant variants[3];
  const CpuVariant* variant = find_variant(name, variants);
  if (variant == nullptr) {
    throw std::invalid_argument("this build has no kernels for the instruction set '" + name + "'");
  }
  if (!variant->supported) {
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'");
  }
  const KernelTable* table = variant->table;
  if (table->abi_version != kAbiVersion || table->struct_size != sizeof(KernelTable)) {
    throw std::runtime_error("kernel table '" + name + "' has another ABI; rebuild pymerge");
  }
  active = table;
}

const KernelTable& table() {
  if (active == nullptr) use_isa("auto");
  return *active;
}

Operand operand(const Address& address) {
  return {reinterpret_cast<const void*>(address.first), static_cast<Dtype>(address.second), 0};
}

MutableOperand output(const Address& address) {
  return {reinterpret_cast<void*>(address.first), static_cast<Dtype>(address.second), 0};
}

std::vector<Operand> operands(const std::vector<Address>& addresses) {
  std::vector<Operand> all;
  for (const Address& address : addresses) all.push_back(operand(address));
  return all;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require_size(const char* name, size_t size, size_t expected) {
  if (size != expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                                " values, one for each model; got " + std::to_string(size));
  }
}

void require(Status status, const char* what) {
  switch (status) {
    case Status::kOk:
      return;
    case Status::kOutOfMemory:
      throw std::bad_alloc();
    case Status::kBadArgument:
      throw std::invalid_argument(std::string(what) + ": the kernel refused its arguments");
    default:
      throw std::runtime_error(std::string(what) + ": the device failed");
  }
}

using SumKernel = Status (*KernelTable::*)(const WeightedSumArgs*);

template <SumKernel Kernel>
int64_t weighted_sum(Address out, Address base, const std::vector<Address>& models,
                     const std::vector<double>& weights, double scale, double divisor,
                     int64_t numel, int32_t compute, int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  require_size("weights", weights.size(), inputs.size());
  int64_t nonfinite = 0;
  WeightedSumArgs args{};
  args.execution = {nullptr, 0, threads};
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  args.weights = weights.data();
  args.scale = scale;
  args.divisor = divisor;
  args.nonfinite = &nonfinite;
  py::gil_scoped_release release;
  require((table().*Kernel)(&args), "weighted_sum");
  return nonfinite;
}

void ties(Address out, uintptr_t stats, Address base, const std::vector<Address>& models,
          const std::vector<int64_t>& thresholds, const std::vector<double>& weights,
          int32_t weighting, int32_t merge, bool elect_count, int32_t zero_sign, double scale,
          bool want_signs, int64_t numel, int32_t compute, int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  require_size("thresholds", thresholds.size(), inputs.size());
  if (weighting != 0) require_size("weights", weights.size(), inputs.size());
  TiesArgs args{};
  args.execution = {nullptr, 0, threads};
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  args.thresholds = thresholds.data();
  args.weights = weighting != 0 ? weights.data() : nullptr;
  args.weighting = static_cast<Weighting>(weighting);
  args.merge = static_cast<TiesMerge>(merge);
  args.elect_count = elect_count;
  args.zero_sign = zero_sign;
  args.scale = scale;
  args.want_signs = want_signs;
  args.stats = pointer<int64_t>(stats);
  py::gil_scoped_release release;
  require(table().ties(&args), "ties");
}

void magnitude_histogram(uintptr_t counts, uintptr_t hot_chunks, int64_t num_chunks, Address base,
                         const std::vector<Address>& models, const std::vector<int64_t>& lo,
                         const std::vector<int64_t>& shift, const std::vector<int64_t>& hot,
                         int64_t num_slots, int64_t num_bins, int64_t numel, int32_t compute,
                         int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  require_size("lo", lo.size(), inputs.size());
  require_size("shift", shift.size(), inputs.size());
  require_size("hot", hot.size(), inputs.size());
  HistogramArgs args{};
  args.execution = {nullptr, 0, threads};
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.lo = lo.data();
  args.shift = shift.data();
  args.hot = hot.data();
  args.num_slots = num_slots;
  args.num_bins = num_bins;
  args.counts = pointer<int32_t>(counts);
  args.num_chunks = num_chunks;
  args.hot_chunks = num_chunks > 0 ? pointer<int32_t>(hot_chunks) : nullptr;
  py::gil_scoped_release release;
  require(table().magnitude_histogram(&args), "magnitude_histogram");
}

void magnitude_equal_counts(uintptr_t counts, Address base, Address model, int64_t key,
                            int64_t chunk, int64_t numel, int32_t compute, int32_t threads) {
  EqualCountsArgs args{};
  args.execution = {nullptr, 0, threads};
  args.compute = static_cast<Dtype>(compute);
  args.numel = numel;
  args.base = operand(base);
  args.model = operand(model);
  args.key = key;
  args.chunk = chunk;
  args.counts = pointer<int64_t>(counts);
  py::gil_scoped_release release;
  require(table().magnitude_equal_counts(&args), "magnitude_equal_counts");
}

py::dict isa_list() {
  CpuVariant variants[3];
  const int count = cpu_variants(variants);
  py::dict result;
  for (int i = 0; i < count; ++i) result[variants[i].name] = variants[i].supported;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pymerge. Use pymerge or torch.ops.pymerge, not this module.";
  m.attr("abi_version") = kAbiVersion;
  m.attr("hot_chunk") = kHotChunk;
  m.attr("compiler") = __VERSION__;
  m.attr("version") = PYMERGE_VERSION;
  m.def("isa_list", &isa_list, "Instruction sets of this build -> whether this machine runs them.");
  m.def("use_isa", &use_isa, "Choose the kernels: baseline, avx2, avx512, or auto.");
  m.def("isa", [] { return std::string(table().name); });
  m.def("default_threads", &default_threads);
  m.def("set_default_threads", &set_default_threads);
  m.def("weighted_sum", &weighted_sum<&KernelTable::weighted_sum>);
  m.def("streaming_floor", &weighted_sum<&KernelTable::streaming_floor>);
  m.def("ties", &ties);
  m.def("magnitude_histogram", &magnitude_histogram);
  m.def("magnitude_equal_counts", &magnitude_equal_counts);
}
