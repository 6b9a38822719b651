"""Sizes that all backends share."""

HOT_CHUNK = 1 << 16  # elements per column of hot_chunks; the same in csrc/kernel_table.h
SUM_CHUNK, SUM_LANES = 1024, 16  # of sums in a fixed order; the same in csrc/cpu/kernels_sums.h
SUM_GROUP = 8  # steps that `compare_` adds up before widening; csrc/cpu/comparison_masks.h
SCORE_ALIGNMENT = 64  # rows of scores are padded to a multiple of this
SOLVED_AT_ONCE = 512  # right-hand sides solved at once; fixed, because results depend on it
