"""The ops in Triton: launches of the kernels in `triton_kernels/`."""
