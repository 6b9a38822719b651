// The building blocks of every kernel call: conversion of the Python arguments, and the call
// itself.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bind/loaded.h"
#include "kernel_table.h"

namespace pymerge::bind {

namespace py = pybind11;

using Address = std::pair<uintptr_t, int32_t>;  // pointer, dtype

inline Execution execution(int32_t threads, int32_t device, uintptr_t stream) {
  return {reinterpret_cast<void*>(stream), device < 0 ? 0 : device, threads};
}

inline Operand operand(const Address& address) {
  return {reinterpret_cast<const void*>(address.first), static_cast<Dtype>(address.second), 0};
}

inline MutableOperand output(const Address& address) {
  return {reinterpret_cast<void*>(address.first), static_cast<Dtype>(address.second), 0};
}

inline std::vector<Operand> operands(const std::vector<Address>& addresses) {
  std::vector<Operand> all;
  for (const Address& address : addresses) all.push_back(operand(address));
  return all;
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void require_size(const char* name, size_t size, size_t expected) {
  if (size != expected) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                                " values, one for each model; got " + std::to_string(size));
  }
}

// Raises the exception for a failed call. kind: that of the op `what`, or empty.
[[noreturn]] inline void raise(Status status, const std::string& what, const std::string& kind,
                               const KernelTable& by) {
  const std::string op = kind.empty() ? what : what + " '" + kind + "'";
  const std::string detail = by.last_error != nullptr ? by.last_error() : "";
  const std::string reason = detail.empty() ? "" : ": " + detail;
  switch (status) {
    case Status::kOutOfMemory:
      throw std::bad_alloc();
    case Status::kBadArgument:
      throw std::invalid_argument(op + ": the kernel refused its arguments" + reason);
    case Status::kUnknownKind:
      throw std::invalid_argument(op + ": '" + by.name + "' has no such kind");
    case Status::kOk:
    case Status::kDeviceFailure:
      break;
  }
  throw std::runtime_error(op + ": the device failed" + reason);
}

template <class Args>
using KernelOf = Status (*)(const Args*);

// Runs a kernel without the GIL; raises if it failed.
template <class Args>
void call(KernelOf<Args> KernelTable::* kernel, const Args& args, const char* what, int32_t device,
          const std::string& kind = "") {
  const KernelTable& by = table(device);
  if (by.*kernel == nullptr) {
    throw std::invalid_argument(std::string(what) + ": '" + by.name + "' has no such kernel");
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = (by.*kernel)(&args);
  }
  if (status != Status::kOk) raise(status, what, kind, by);
}

// Which elements of the sparse task vectors are kept: one entry for each model in every vector; two
// seeds for each, or none.
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

// The arguments that every call has: execution, sizes, operands.
struct Common {
  Address base;
  std::vector<Operand> inputs;
  int64_t numel;
  int32_t compute, threads, device;
  uintptr_t stream;

  // From Python: (base, models, numel, compute, threads[, device, stream])
  explicit Common(const py::tuple& all)
      : base(all[0].cast<Address>()),
        inputs(operands(all[1].cast<std::vector<Address>>())),
        numel(all[2].cast<int64_t>()),
        compute(all[3].cast<int32_t>()),
        threads(all[4].cast<int32_t>()),
        device(all.size() > 5 ? all[5].cast<int32_t>() : -1),
        stream(all.size() > 6 ? all[6].cast<uintptr_t>() : 0) {}

  template <class Args>
  void fill(Args& args) const {
    args.execution = execution(threads, device, stream);
    args.num_models = static_cast<int32_t>(inputs.size());
    args.numel = numel;
    args.base = operand(base);
    args.models = inputs.data();
    if constexpr (!std::is_same_v<Args, PcbArgs>) args.compute = static_cast<Dtype>(compute);
  }
};

// Ranks of elements within their rows, which may decide which elements are kept: (address, stride).
// chances: two for each model, or none.
struct Ranked {
  std::pair<uintptr_t, int64_t> ranks;
  const std::vector<double>& chances;

  template <class Args>
  void fill(Args& args, size_t models) const {
    if (!chances.empty()) require_size("chances", chances.size(), 2 * models);
    args.ranks = pointer<int32_t>(ranks.first);
    args.rank_stride = ranks.second;
    args.chances = chances.empty() ? nullptr : chances.data();
  }
};

}  // namespace pymerge::bind
