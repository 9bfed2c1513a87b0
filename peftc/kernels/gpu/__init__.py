"""The kernels in Triton, a file each. Nothing here is imported before a CUDA tensor needs it."""
