#define PM_VECTOR_BYTES 32
#include "cpu/kernels_magnitude.h"
#include "cpu/kernels_ties.h"
#include "cpu/tables.h"

namespace pymerge {

const KernelTable* avx2_table() {
  static const KernelTable table{
      kAbiVersion,         sizeof(KernelTable),    "avx2",         weighted_sum, ties,
      magnitude_histogram, magnitude_equal_counts, streaming_floor};
  return &table;
}

}  // namespace pymerge
