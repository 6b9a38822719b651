// pymerge._C: loads kernel tables and marshals. Pointers come as integers; the Python side has
// already validated everything (pymerge/backends/cpu.py, cuda.py). Device -1 is the CPU.
#include <dlfcn.h>
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
using namespace py::literals;

namespace {

using Address = std::pair<uintptr_t, int32_t>;  // pointer, dtype

const KernelTable* active = nullptr;  // of the CPU
const KernelTable* cuda = nullptr;

const CpuVariant* find_variant(const std::string& name, CpuVariant* variants) {
  const int count = cpu_variants(variants);
  for (int i = count - 1; i >= 0; --i) {
    if (name == "auto" ? variants[i].supported : name == variants[i].name) return &variants[i];
  }
  return nullptr;
}

const KernelTable* checked(const KernelTable* table, const std::string& name) {
  if (table->abi_version != kAbiVersion || table->struct_size != sizeof(KernelTable)) {
    throw std::runtime_error("kernel table '" + name + "' has another ABI; rebuild pymerge");
  }
  return table;
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
  active = checked(variant->table, name);
}

// Loads the CUDA library; an empty path forgets it. It stays loaded: work may still be under way.
void load_cuda(const std::string& path) {
  cuda = nullptr;
  if (path.empty()) return;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  using Entry = const KernelTable* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "pymerge_cuda_table"));
  if (entry == nullptr) throw std::runtime_error(path + " is not pymerge's CUDA library");
  cuda = checked(entry(), path);
}

const KernelTable& table(int32_t device) {
  if (device >= 0) {
    if (cuda == nullptr) throw std::runtime_error("the CUDA library is not loaded");
    return *cuda;
  }
  if (active == nullptr) use_isa("auto");
  return *active;
}

Execution execution(int32_t threads, int32_t device, uintptr_t stream) {
  return {reinterpret_cast<void*>(stream), device < 0 ? 0 : device, threads};
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

void require(Status status, const char* what, const KernelTable& by) {
  const std::string detail = by.last_error != nullptr ? by.last_error() : "";
  const std::string reason = detail.empty() ? "" : ": " + detail;
  switch (status) {
    case Status::kOk:
      return;
    case Status::kOutOfMemory:
      throw std::bad_alloc();
    case Status::kBadArgument:
      throw std::invalid_argument(std::string(what) + ": the kernel refused its arguments" +
                                  reason);
    default:
      throw std::runtime_error(std::string(what) + ": the device failed" + reason);
  }
}

template <class Args>
using KernelOf = Status (*)(const Args*);

// Runs a kernel without the GIL; raises if it failed.
template <class Args>
void call(KernelOf<Args> KernelTable::* kernel, const Args& args, const char* what,
          int32_t device) {
  const KernelTable& by = table(device);
  if (by.*kernel == nullptr) {
    throw std::invalid_argument(std::string(what) + ": '" + by.name + "' has no such kernel");
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = (by.*kernel)(&args);
  }
  require(status, what, by);
}

using SumKernel = KernelOf<WeightedSumArgs> KernelTable::*;

// Returns the flag of non-finite results, but adds it to `stats` where there is such a counter.
template <SumKernel Kernel>
int64_t weighted_sum(Address out, Address base, const std::vector<Address>& models,
                     const std::vector<double>& weights, double scale, double divisor,
                     int64_t numel, int32_t compute, int32_t threads, int32_t device,
                     uintptr_t stream, uintptr_t stats) {
  const std::vector<Operand> inputs = operands(models);
  require_size("weights", weights.size(), inputs.size());
  int64_t nonfinite = 0;
  WeightedSumArgs args{};
  args.execution = execution(threads, device, stream);
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  args.weights = weights.data();
  args.scale = scale;
  args.divisor = divisor;
  args.nonfinite = stats != 0 ? pointer<int64_t>(stats) : &nonfinite;
  call(Kernel, args, "weighted_sum", device);
  return nonfinite;
}

void ties(Address out, uintptr_t stats, Address base, const std::vector<Address>& models,
          const std::vector<int64_t>& thresholds, const std::vector<double>& weights,
          int32_t weighting, int32_t merge, bool elect_count, int32_t zero_sign, double scale,
          bool want_signs, int64_t numel, int32_t compute, int32_t threads, int32_t device,
          uintptr_t stream) {
  const std::vector<Operand> inputs = operands(models);
  require_size("thresholds", thresholds.size(), inputs.size());
  if (weighting != 0) require_size("weights", weights.size(), inputs.size());
  TiesArgs args{};
  args.execution = execution(threads, device, stream);
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
  call(&KernelTable::ties, args, "ties", device);
}

void magnitude_histogram(uintptr_t counts, uintptr_t hot_chunks, int64_t num_chunks, Address base,
                         const std::vector<Address>& models, const std::vector<int64_t>& lo,
                         const std::vector<int64_t>& shift, const std::vector<int64_t>& hot,
                         int64_t num_slots, int64_t num_bins, int64_t numel, int32_t compute,
                         int32_t threads, int32_t device, uintptr_t stream) {
  const std::vector<Operand> inputs = operands(models);
  require_size("lo", lo.size(), inputs.size());
  require_size("shift", shift.size(), inputs.size());
  require_size("hot", hot.size(), inputs.size());
  HistogramArgs args{};
  args.execution = execution(threads, device, stream);
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
  call(&KernelTable::magnitude_histogram, args, "magnitude_histogram", device);
}

void magnitude_equal_counts(uintptr_t counts, Address base, Address model, int64_t key,
                            int64_t chunk, int64_t numel, int32_t compute, int32_t threads,
                            int32_t device, uintptr_t stream) {
  EqualCountsArgs args{};
  args.execution = execution(threads, device, stream);
  args.compute = static_cast<Dtype>(compute);
  args.numel = numel;
  args.base = operand(base);
  args.model = operand(model);
  args.key = key;
  args.chunk = chunk;
  args.counts = pointer<int64_t>(counts);
  call(&KernelTable::magnitude_equal_counts, args, "magnitude_equal_counts", device);
}

template <KernelOf<Execution> KernelTable::* Function>
void phase(int32_t device, uintptr_t stream) {
  call(Function, execution(0, device, stream), "phase", device);
}

// What is kept of sparse task vectors: one of each for each model, seeds two or none.
struct Kept {
  const std::vector<int64_t>& lo;
  const std::vector<int64_t>& last;
  const std::vector<int64_t>& seeds;
  const std::vector<int64_t>& limits;

  void check(size_t models) const {
    require_size("lo", lo.size(), models);
    require_size("last", last.size(), models);
    if (seeds.empty()) return;
    require_size("seeds", seeds.size(), 2 * models);
    require_size("limits", limits.size(), models);
  }
  template <class Args>
  void fill(Args& args) const {
    args.lo = lo.data();
    args.last = last.data();
    args.seeds = seeds.empty() ? nullptr : seeds.data();
    args.limits = limits.data();
  }
};

int64_t sparse_merge(Address out, Address base, const std::vector<Address>& models,
                     const std::vector<int64_t>& lo, const std::vector<int64_t>& last,
                     const std::vector<int64_t>& seeds, const std::vector<int64_t>& limits,
                     const std::vector<double>& factors, const std::vector<double>& weights,
                     bool elect, bool divide, double divisor, double scale, int64_t start,
                     int64_t numel, int32_t compute, int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  const Kept kept{lo, last, seeds, limits};
  kept.check(inputs.size());
  require_size("factors", factors.size(), inputs.size());
  require_size("weights", weights.size(), inputs.size());
  int64_t nonfinite = 0;
  SparseArgs args{};
  args.execution = execution(threads, -1, 0);
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  kept.fill(args);
  args.factors = factors.data();
  args.weights = weights.data();
  args.elect = elect;
  args.divide = divide;
  args.divisor = divisor;
  args.scale = scale;
  args.start = start;
  args.nonfinite = &nonfinite;
  call(&KernelTable::sparse_merge, args, "sparse_merge", -1);
  return nonfinite;
}

int64_t pointwise(Address out, Address base, const std::vector<Address>& models, int32_t op,
                  const std::vector<double>& reals, int64_t numel, int32_t compute,
                  int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  int64_t nonfinite = 0;
  PointwiseArgs args{};
  args.execution = execution(threads, -1, 0);
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  args.op = static_cast<Pointwise>(op);
  args.num_reals = static_cast<int32_t>(reals.size());
  args.reals = reals.data();
  args.nonfinite = &nonfinite;
  call(&KernelTable::pointwise, args, "pointwise", -1);
  return nonfinite;
}

void chunk_sums(uintptr_t partials, int64_t num_chunks, int32_t kind, Address base,
                const std::vector<Address>& models, const std::vector<int64_t>& lo,
                const std::vector<int64_t>& last, const std::vector<int64_t>& seeds,
                const std::vector<int64_t>& limits, int64_t start, int64_t numel, int32_t compute,
                int32_t threads, const std::vector<float>& reals) {
  const std::vector<Operand> inputs = operands(models);
  const Kept kept{lo, last, seeds, limits};
  SumsArgs args{};
  const size_t pairs = inputs.size() * (inputs.size() + 1) / 2;
  if (static_cast<SumsKind>(kind) == SumsKind::kPcbExp) {
    require_size("reals", reals.size(), 2 * pairs);
    args.reals = reals.data();
  }
  args.kind = static_cast<SumsKind>(kind);
  if (args.kind == SumsKind::kSparse) {
    kept.check(inputs.size());
    kept.fill(args);
  }
  args.execution = execution(threads, -1, 0);
  args.compute = static_cast<Dtype>(compute);
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.start = start;
  args.num_chunks = num_chunks;
  args.partials = pointer<double>(partials);
  call(&KernelTable::chunk_sums, args, "chunk_sums", -1);
}

int64_t pcb(Address out, uintptr_t scores, int64_t stride, Address base,
            const std::vector<Address>& models, int32_t variant, const std::vector<float>& reals,
            int64_t numel, int32_t threads) {
  const std::vector<Operand> inputs = operands(models);
  int64_t nonfinite = 0;
  PcbArgs args{};
  args.execution = execution(threads, -1, 0);
  args.variant = variant;
  args.num_models = static_cast<int32_t>(inputs.size());
  args.numel = numel;
  args.base = operand(base);
  args.models = inputs.data();
  args.out = output(out);
  args.scores = pointer<float>(scores);
  args.stride = stride;
  args.reals = reals.data();
  args.num_reals = static_cast<int64_t>(reals.size());
  args.nonfinite = &nonfinite;
  call(&KernelTable::pcb, args, "pcb", -1);
  return nonfinite;
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
  m.def("isa", [] { return std::string(table(-1).name); });
  m.def("default_threads", &default_threads);
  m.def("set_default_threads", &set_default_threads);
  m.def("load_cuda", &load_cuda, "Load the CUDA library at a path; an empty path forgets it.");
  m.def("begin", &phase<&KernelTable::begin>, "Queue what follows on a device and stream.");
  m.def("end", &phase<&KernelTable::end>, "Launch what is queued.");
  m.def("check", &phase<&KernelTable::check>, "Raise unless the device can run the kernels.");
  const auto device = "device"_a = -1;
  const auto stream = "stream"_a = 0;
  m.def("weighted_sum", &weighted_sum<&KernelTable::weighted_sum>, "out"_a, "base"_a, "models"_a,
        "weights"_a, "scale"_a, "divisor"_a, "numel"_a, "compute"_a, "threads"_a, device, stream,
        "stats"_a = 0);
  m.def("streaming_floor", &weighted_sum<&KernelTable::streaming_floor>, "out"_a, "base"_a,
        "models"_a, "weights"_a, "scale"_a, "divisor"_a, "numel"_a, "compute"_a, "threads"_a,
        device, stream, "stats"_a = 0);
  m.def("ties", &ties, "out"_a, "stats"_a, "base"_a, "models"_a, "thresholds"_a, "weights"_a,
        "weighting"_a, "merge"_a, "elect_count"_a, "zero_sign"_a, "scale"_a, "want_signs"_a,
        "numel"_a, "compute"_a, "threads"_a, device, stream);
  m.def("magnitude_histogram", &magnitude_histogram, "counts"_a, "hot_chunks"_a, "num_chunks"_a,
        "base"_a, "models"_a, "lo"_a, "shift"_a, "hot"_a, "num_slots"_a, "num_bins"_a, "numel"_a,
        "compute"_a, "threads"_a, device, stream);
  m.def("magnitude_equal_counts", &magnitude_equal_counts, "counts"_a, "base"_a, "model"_a, "key"_a,
        "chunk"_a, "numel"_a, "compute"_a, "threads"_a, device, stream);
  m.attr("sum_chunk") = kSumChunk;
  m.def("sparse_merge", &sparse_merge);
  m.def("pointwise", &pointwise);
  m.def("chunk_sums", &chunk_sums);
  m.def("pcb", &pcb);
}
