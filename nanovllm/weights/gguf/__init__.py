"""GGUF files: what llama.cpp's converter did to a Hugging Face directory, undone."""

from nanovllm.weights.gguf.checkpoint import GGUFCheckpoint

__all__ = ["GGUFCheckpoint"]
