// Looks up the kinds of ops by name; the names are those of the .def files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernel_table.h"

namespace pymerge::bind {

template <class Kind>
struct Named {
  const char* name;
  Kind kind;
};

constexpr Named<Pointwise> kPointwise[] = {
#define PM_POINTWISE(kind, name, reals, models) {#name, Pointwise::kind},
#include "pointwise.def"
};

constexpr Named<SumsKind> kSums[] = {
#define PM_SUMS(kind, name, rows, reals, inputs) {#name, SumsKind::kind},
#include "sums.def"
};

constexpr Named<Divergence> kDivergences[] = {
#define PM_DIVERGENCE(kind, name, first, rows) {#name, Divergence::kind},
#include "divergence.def"
};

// "backend 'cpu': pointwise_: ", the prefix of a call's error messages.
inline std::string where(const char* op, int32_t device) {
  return std::string("backend '") + (device < 0 ? "cpu" : "cuda") + "': " + op + ": ";
}

// Returns the kind with that name; raises if there is none.
template <class Kind, size_t kCount>
Kind kind_named(const Named<Kind> (&all)[kCount], const std::string& name, const char* op,
                int32_t device) {
  std::string known;
  for (const Named<Kind>& one : all) {
    if (name == one.name) return one.kind;
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  throw std::invalid_argument(where(op, device) + "expected one of " + known + "; got '" + name +
                              "'");
}

// Raises unless the number of reals is the one that the kind takes.
inline void require_reals(size_t count, int64_t expected, const std::string& kind, size_t models,
                          const char* op, int32_t device) {
  if (static_cast<int64_t>(count) == expected) return;
  throw std::invalid_argument(where(op, device) + "reals: expected " + std::to_string(expected) +
                              " for '" + kind + "' of " + std::to_string(models) + " models; got " +
                              std::to_string(count));
}

}  // namespace pymerge::bind
