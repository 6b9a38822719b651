// Which kernels there are: those of an instruction set, and of the CUDA library once it is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernel_table.h"

namespace pymerge::bind {

// KernelTable::abi in hexadecimal digits.
std::string abi_text(uint64_t abi);

// Chooses the kernels of the CPU: a name of `isa_list`, or "auto".
void use_isa(const std::string& name);

// The instruction sets of this build, and whether this machine runs them.
std::vector<std::pair<std::string, bool>> isa_list();

// Loads the CUDA library; an empty path forgets it. It stays loaded: work may still be under way.
void load_cuda(const std::string& path);

// The kernels for a device; -1 is the CPU.
const KernelTable& table(int32_t device);

}  // namespace pymerge::bind
