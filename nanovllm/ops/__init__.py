"""Leaf operations of layers, by several makers: torch's own kernels, and ours for CPUs."""
