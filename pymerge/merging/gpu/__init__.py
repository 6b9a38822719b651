"""Merging checkpoints on a GPU: what fits, what is staged, what is waited for."""
