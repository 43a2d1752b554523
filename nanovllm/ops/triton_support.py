"""Whether the kernels of triton_kernels/ can run; asked without importing triton."""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST = 7, 5  # compute capability


def interpreted() -> bool:
    """Whether Triton interprets kernels on CPU tensors, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "is not installed: pip install triton"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"needs a device of compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None
