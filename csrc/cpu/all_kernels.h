// Every kernel of one instruction set, and its table.
#pragma once

#include "cpu/kernels_comparison.h"
#include "cpu/kernels_divergence.h"
#include "cpu/kernels_importance.h"
#include "cpu/kernels_low_rank.h"
#include "cpu/kernels_magnitude.h"
#include "cpu/kernels_packed.h"
#include "cpu/kernels_pcb.h"
#include "cpu/kernels_pointwise.h"
#include "cpu/kernels_rows.h"
#include "cpu/kernels_sparse.h"
#include "cpu/kernels_sums.h"
#include "cpu/kernels_ties.h"

namespace pymerge {
namespace {

void fill_table(KernelTable& table) {
  table.abi = kAbi;
  table.weighted_sum = weighted_sum;
  table.ties = ties;
  table.magnitude_histogram = magnitude_histogram;
  table.magnitude_equal_counts = magnitude_equal_counts;
  table.streaming_floor = streaming_floor;
  table.sparse_merge = sparse_merge;
  table.pointwise = pointwise;
  table.chunk_sums = chunk_sums;
  table.pcb = pcb;
  table.packed = packed;
  table.row_ranks = row_ranks;
  table.row_weighted_sum = row_weighted_sum;
  table.divergence_sums = divergence_sums;
  table.row_importance = row_importance;
  table.low_rank = low_rank;
  table.compare = compare;
}

}  // namespace
}  // namespace pymerge
