#define PM_VECTOR_BYTES 16
#include "cpu/all_kernels.h"
#include "cpu/tables.h"

namespace pymerge {

const KernelTable* baseline_table() {
  static const KernelTable table = [] {
    KernelTable all{};
    all.name = "baseline";
    fill_table(all);
    return all;
  }();
  return &table;
}

}  // namespace pymerge
