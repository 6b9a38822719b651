"""The compiled kernels: of the processor and of CUDA devices."""
