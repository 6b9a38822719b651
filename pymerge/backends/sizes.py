"""Sizes that all backends share."""

HOT_CHUNK = 1 << 16  # elements of a column of hot_chunks; csrc/kernel_table.h has the same
