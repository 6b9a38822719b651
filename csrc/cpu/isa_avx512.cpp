#define PM_VECTOR_BYTES 64
#include "cpu/all_kernels.h"
#include "cpu/tables.h"

namespace pymerge {

const KernelTable* avx512_table() {
  static const KernelTable table = [] {
    KernelTable all{};
    all.name = "avx512";
    fill_table(all);
    return all;
  }();
  return &table;
}

}  // namespace pymerge
