"""Merging checkpoints on a GPU: memory limits, staging of tensors, synchronization."""
