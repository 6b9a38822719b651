#define PM_VECTOR_BYTES 32
#include "cpu/all_kernels.h"
#include "cpu/tables.h"

namespace pymerge {

const KernelTable* avx2_table() {
  static const KernelTable table = [] {
    KernelTable all{};
    all.name = "avx2";
    fill_table(all);
    return all;
  }();
  return &table;
}

}  // namespace pymerge
