"""What drives a merge: tensors in memory, checkpoints, reports."""
