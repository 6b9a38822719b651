// The kernels in use: those of one CPU instruction set, and those of the CUDA library once loaded.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace pymerge::bind {

// KernelTable::abi as hexadecimal digits.
std::string abi_text(uint64_t abi);

// Selects the CPU kernels: a name from `isa_list`, or "auto".
void use_isa(const std::string& name);

// The instruction sets of this build, each with whether this machine supports it.
std::vector<std::pair<std::string, bool>> isa_list();

// Loads the CUDA library; an empty path drops it from use. It stays in memory, since work may still
// be in flight.
void load_cuda(const std::string& path);

// The kernels for a device; -1 is the CPU.
const KernelTable& table(int32_t device);

}  // namespace pymerge::bind
