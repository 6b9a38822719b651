"""The compiled kernels, for CPUs and for CUDA devices."""
