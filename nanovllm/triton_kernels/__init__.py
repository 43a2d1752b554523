"""Triton kernels: the GPU's twin of csrc/. A file is a family: kernels, launch functions and `variants()`."""
