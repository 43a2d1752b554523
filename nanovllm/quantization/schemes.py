"""Which scheme a checkpoint is quantised by."""

from __future__ import annotations

from typing import Any

from nanovllm.errors import ModelNotSupported
from nanovllm.quantization.awq import AWQ
from nanovllm.quantization.compressed_tensors import CompressedTensors
from nanovllm.quantization.fp8 import FP8
from nanovllm.quantization.gptq import GPTQ
from nanovllm.quantization.published import Scheme
from nanovllm.quantization.settings import Settings

_SCHEMES = {scheme.method: scheme for scheme in (AWQ, GPTQ, CompressedTensors, FP8)}


def read_scheme(config: Any, path: str) -> Scheme:
    """config: quantization_config. path: for messages. ModelNotSupported for what there is no code for."""
    method = str(config.get("quant_method", "no quant_method") if isinstance(config, dict) else config)
    if method not in _SCHEMES or not isinstance(config, dict):
        raise ModelNotSupported(
            f"{path} is quantised ({method}), which is not supported ({', '.join(_SCHEMES)} are); use such a version, "
            "an unquantised one or a GGUF file"
        )
    return _SCHEMES[method].of(Settings(config, f"{path}: quantization_config"))
