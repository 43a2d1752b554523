"""The parts of bench.py. What runs in a peer's interpreter imports neither torch nor nanovllm at its head."""
