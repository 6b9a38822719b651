// The entries of the library's table that are defined in separate files.
#pragma once

#include "kernel_table.h"

namespace pymerge {
namespace cuda {

Status sparse_merge(const SparseArgs* args);
Status pointwise(const PointwiseArgs* args);
Status pcb(const PcbArgs* args);
Status row_weighted_sum(const RowSumArgs* args);
Status chunk_sums(const SumsArgs* args);
Status packed(const PackedArgs* args);
Status divergence_sums(const DivergenceArgs* args);
Status row_importance(const ImportanceArgs* args);

}  // namespace cuda
}  // namespace pymerge
