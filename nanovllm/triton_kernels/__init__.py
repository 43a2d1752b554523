"""Triton kernels for GPUs: a file a family, each with the functions that launch them."""
