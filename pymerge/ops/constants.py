"""Sizes that all backends share."""

HOT_CHUNK = 1 << 16  # elements of a column of hot_chunks; csrc/kernel_table.h has the same
SUM_CHUNK, SUM_LANES = 1024, 16  # of sums in a fixed order; csrc/cpu/kernels_sums.h has the same
SUM_GROUP = 8  # steps that `compare_` adds up before it widens; csrc/cpu/comparison_masks.h
SCORE_ALIGNMENT = 64  # rows of scores have room for a multiple of this
SOLVED_AT_ONCE = 512  # right sides of a linear system; results depend on it, so it is fixed
