// pymerge._C: one function for each kernel. Pointers are passed as integers; the Python side has
// already validated the memory behind them (pymerge/ops/native/marshal.py, marshal_cuda.py). Device
// -1 is the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/call.h"
#include "bind/kinds.h"
#include "bind/loaded.h"
#include "cpu/thread_pool.h"
#include "kernel_table.h"

namespace py = pybind11;
using namespace pymerge;
using namespace pymerge::bind;
using namespace py::literals;

namespace {

using SumKernel = KernelOf<WeightedSumArgs> KernelTable::*;

// Returns the flag for non-finite results, or adds it to `stats` if such a counter is given.
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

void sparse_merge(const py::tuple& common, Address out, uintptr_t stats,
                  const std::vector<int64_t>& lo, const std::vector<int64_t>& last,
                  const std::vector<int64_t>& seeds, const std::vector<int64_t>& limits,
                  const std::vector<double>& factors, const std::vector<double>& weights,
                  bool elect, bool divide, double divisor, double scale, int64_t start, bool bare,
                  std::pair<uintptr_t, int64_t> ranks, const std::vector<double>& chances,
                  bool per_element) {
  const Common all(common);
  const Kept kept{lo, last, seeds, limits};
  kept.check(all.inputs.size());
  require_size("factors", factors.size(), all.inputs.size());
  require_size("weights", weights.size(), all.inputs.size());
  SparseArgs args{};
  all.fill(args);
  args.out = output(out);
  kept.fill(args);
  Ranked{ranks, chances}.fill(args, all.inputs.size());
  args.per_element = per_element;
  args.factors = factors.data();
  args.weights = weights.data();
  args.elect = elect;
  args.divide = divide;
  args.divisor = divisor;
  args.scale = scale;
  args.start = start;
  args.bare = bare;
  args.nonfinite = pointer<int64_t>(stats) + 2;
  call(&KernelTable::sparse_merge, args, "sparse_merge", all.device);
}

void pointwise(const py::tuple& common, Address out, uintptr_t stats, const std::string& kind,
               const std::vector<double>& reals) {
  const Common all(common);
  PointwiseArgs args{};
  all.fill(args);
  args.out = output(out);
  args.op = kind_named(kPointwise, kind, "pointwise_", all.device);
  require_reals(reals.size(), pointwise_reals(args.op, args.num_models), kind, all.inputs.size(),
                "pointwise_", all.device);
  args.num_reals = static_cast<int32_t>(reals.size());
  args.reals = reals.data();
  args.nonfinite = pointer<int64_t>(stats) + 2;
  call(&KernelTable::pointwise, args, "pointwise", all.device, kind);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

// shape: the shape of the partials, [sums, chunks or rows].
void chunk_sums(const py::tuple& common, uintptr_t partials, const std::vector<int64_t>& shape,
                const std::string& kind, int64_t columns, const std::vector<int64_t>& lo,
                const std::vector<int64_t>& last, const std::vector<int64_t>& seeds,
                const std::vector<int64_t>& limits, int64_t start,
                std::pair<uintptr_t, int64_t> ranks, const std::vector<double>& chances,
                const std::vector<double>& reals) {
  const Common all(common);
  const Kept kept{lo, last, seeds, limits};
  SumsArgs args{};
  all.fill(args);
  args.kind = kind_named(kSums, kind, "chunk_sums_", all.device);
  const SumsShape wanted = sums_shape(args.kind, args.num_models);
  require_reals(reals.size(), wanted.reals, kind, all.inputs.size(), "chunk_sums_", all.device);
  const int64_t length = columns > 0 ? columns : kSumChunk;
  const std::vector<int64_t> expected{wanted.rows, (args.numel + length - 1) / length};
  if (shape != expected) {
    throw std::invalid_argument(where("chunk_sums_", all.device) + "expected partials of shape " +
                                shape_text(expected) + ", got " + shape_text(shape));
  }
  if (args.kind == SumsKind::kSparse) {
    kept.check(all.inputs.size());
    kept.fill(args);
    Ranked{ranks, chances}.fill(args, all.inputs.size());
  }
  if (args.kind == SumsKind::kSce) {
    require_size("lo", lo.size(), 1);
    args.lo = lo.data();
  }
  args.num_reals = static_cast<int32_t>(reals.size());
  args.reals = reals.data();
  args.start = start;
  args.columns = columns;
  args.num_chunks = expected[1];
  args.partials = pointer<double>(partials);
  call(&KernelTable::chunk_sums, args, "chunk_sums", all.device, kind);
}

void pcb(const py::tuple& common, Address out, uintptr_t stats, uintptr_t scores, int64_t stride,
         int32_t variant, const std::vector<float>& reals) {
  const Common all(common);
  PcbArgs args{};
  all.fill(args);
  args.variant = variant;
  args.out = output(out);
  args.scores = pointer<float>(scores);
  args.stride = stride;
  args.reals = reals.data();
  args.num_reals = static_cast<int64_t>(reals.size());
  args.nonfinite = pointer<int64_t>(stats) + 2;
  call(&KernelTable::pcb, args, "pcb", all.device);
}

// Trimmed task vectors; the models of `common` are their kept values. Computes the dot products
// with the gradient if partials are given, else the weighted sum.
void packed(const py::tuple& common, const std::vector<uintptr_t>& masks,
            const std::vector<uintptr_t>& offsets, Address out, const std::vector<double>& weights,
            Address gradient, uintptr_t partials, int64_t num_chunks) {
  const Common all(common);
  require_size("masks", masks.size(), all.inputs.size());
  require_size("offsets", offsets.size(), all.inputs.size());
  if (partials == 0) require_size("weights", weights.size(), all.inputs.size());
  std::vector<const uint32_t*> words;
  std::vector<const int64_t*> starts;
  for (uintptr_t mask : masks) words.push_back(pointer<uint32_t>(mask));
  for (uintptr_t offset : offsets) starts.push_back(pointer<int64_t>(offset));
  PackedArgs args{};
  all.fill(args);
  args.masks = words.data();
  args.offsets = starts.data();
  args.gradient = operand(gradient);
  args.out = output(out);
  args.weights = weights.data();
  args.num_chunks = num_chunks;
  args.partials = pointer<double>(partials);
  call(&KernelTable::packed, args, "packed", all.device);
}

void low_rank(Address out, Address base, uintptr_t b, uintptr_t a, double scale, int64_t rows,
              int64_t columns, int64_t rank) {
  LowRankArgs args{};
  args.execution = execution(0, -1, 0);
  args.rows = rows;
  args.columns = columns;
  args.rank = rank;
  args.base = operand(base);
  args.b = pointer<float>(b);
  args.a = pointer<float>(a);
  args.scale = scale;
  args.out = output(out);
  call(&KernelTable::low_rank, args, "low_rank", -1);
}

void row_ranks(const py::tuple& common, uintptr_t ranks, int64_t stride, int64_t columns) {
  const Common all(common);
  RanksArgs args{};
  all.fill(args);
  args.columns = columns;
  args.ranks = pointer<int32_t>(ranks);
  args.stride = stride;
  call(&KernelTable::row_ranks, args, "row_ranks", all.device);
}

void row_weighted_sum(const py::tuple& common, Address out, uintptr_t stats, uintptr_t weights,
                      int64_t columns) {
  const Common all(common);
  RowSumArgs args{};
  all.fill(args);
  args.columns = columns;
  args.out = output(out);
  args.weights = pointer<double>(weights);
  args.nonfinite = pointer<int64_t>(stats);
  call(&KernelTable::row_weighted_sum, args, "row_weighted_sum", all.device);
}

void divergence_sums(const py::tuple& common, uintptr_t table, int64_t num_chunks,
                     const std::string& kind, int64_t columns) {
  const Common all(common);
  DivergenceArgs args{};
  all.fill(args);
  args.kind = kind_named(kDivergences, kind, "divergence_sums_", all.device);
  args.columns = columns;
  args.num_chunks = num_chunks;
  args.table = pointer<double>(table);
  call(&KernelTable::divergence_sums, args, "divergence_sums", all.device, kind);
}

void row_importance(const py::tuple& common, Address out, uintptr_t stats, uintptr_t divergences,
                    std::optional<double> threshold, int64_t columns) {
  const Common all(common);
  ImportanceArgs args{};
  all.fill(args);
  args.columns = columns;
  args.out = output(out);
  args.divergences = pointer<double>(divergences);
  args.threshold = threshold.value_or(0.0);
  args.merge = threshold.has_value();
  args.nonfinite = pointer<int64_t>(stats) + 2;
  call(&KernelTable::row_importance, args, "row_importance", all.device);
}

void compare(const py::tuple& common, const std::vector<int64_t>& thresholds, int64_t start,
             int32_t every, uintptr_t sums, int64_t num_segments, uintptr_t counts) {
  const Common all(common);
  ComparisonArgs args{};
  all.fill(args);
  const size_t models = static_cast<size_t>(args.num_models);
  if (models == 0 || thresholds.size() % models != 0) {
    throw std::invalid_argument("thresholds: expected one for each model and level");
  }
  args.thresholds = thresholds.data();
  args.num_levels = static_cast<int32_t>(thresholds.size() / models);
  args.every = every;
  args.start = start;
  args.num_segments = num_segments;
  args.sums = pointer<double>(sums);
  args.counts = pointer<int64_t>(counts);
  call(&KernelTable::compare, args, "compare", all.device);
}

py::dict isa_dict() {
  py::dict result;
  for (const auto& [name, runs] : isa_list()) result[name.c_str()] = runs;
  return result;
}

// Maps each kind of an op to the result of `numbers`.
template <class Kind, size_t kCount, class Numbers>
py::dict kinds_of(const Named<Kind> (&all)[kCount], Numbers numbers) {
  py::dict result;
  for (const Named<Kind>& one : all) result[one.name] = numbers(one.kind);
  return result;
}

py::dict pointwise_kinds(int64_t models) {
  return kinds_of(kPointwise, [&](Pointwise kind) { return pointwise_reals(kind, models); });
}

py::dict sums_kinds(int64_t models) {
  return kinds_of(kSums, [&](SumsKind kind) {
    const SumsShape shape = sums_shape(kind, models);
    return std::pair(shape.rows, shape.reals);
  });
}

py::dict divergence_kinds() {
  return kinds_of(kDivergences, [](Divergence kind) {
    const DivergenceRows rows = divergence_rows(kind);
    return std::pair(rows.first, rows.count);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pymerge. Use pymerge or torch.ops.pymerge, not this module.";
  m.attr("abi") = abi_text(kAbi);
  m.attr("hot_chunk") = kHotChunk;
  m.attr("compiler") = __VERSION__;
  m.attr("version") = PYMERGE_VERSION;
  m.def("isa_list", &isa_dict, "Instruction sets of this build -> whether this machine runs them.");
  m.def("use_isa", &use_isa, "Choose the kernels: baseline, avx2, avx512, or auto.");
  m.def("isa", [] { return std::string(table(-1).name); });
  m.def("default_threads", &default_threads);
  m.def("set_default_threads", &set_default_threads);
  m.def(
      "table", [](int32_t device) { return reinterpret_cast<uintptr_t>(&table(device)); },
      "Address of the kernel table (csrc/kernel_table.h) in use, or of the CUDA library's.",
      "device"_a = -1);
  m.def("pointwise_kinds", &pointwise_kinds, "Kinds -> how many reals each takes.", "models"_a);
  m.def("sums_kinds", &sums_kinds, "Kinds -> rows of partial sums, and reals.", "models"_a);
  m.def("divergence_kinds", &divergence_kinds, "Kinds -> first row of the table, and how many.");
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
  m.def("packed", &packed);
  m.def("low_rank", &low_rank);
  m.def("row_ranks", &row_ranks);
  m.def("row_weighted_sum", &row_weighted_sum);
  m.def("divergence_sums", &divergence_sums);
  m.def("row_importance", &row_importance);
  m.def("compare", &compare);
}
