// The instruction sets this library was built for, and which of them this machine can run.
#pragma once

#include "kernel_table.h"

namespace pymerge {

const KernelTable* baseline_table();
#if !defined(PYMERGE_BASELINE_ONLY)
const KernelTable* avx2_table();
const KernelTable* avx512_table();
#endif

struct CpuVariant {
  const char* name;
  const KernelTable* table;
  bool supported;  // by this machine
};

// Fills `variants`, which has room for 3, fastest last; returns their number.
int cpu_variants(CpuVariant* variants);

}  // namespace pymerge
