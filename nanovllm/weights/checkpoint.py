"""Checkpoint: a model's files, whatever their format, in Hugging Face's names."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from nanovllm.errors import ConfigError, ModelNotFound, ModelNotSupported, WeightError
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.tensor_source import LazyTensor


class Checkpoint(Protocol):
    """config, generation_config: as in Hugging Face's JSON files, either generation.
    dtype: "float32", "float16" or "bfloat16", of the weights on disk."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    dtype: str

    def tensors(self) -> Iterator[LazyTensor]: ...

    def load_tokenizer(self) -> Tokenizer: ...


def open_checkpoint(path: Path, load_format: str = "auto") -> Checkpoint:
    """Read the small files of a directory or the header of a `.gguf` file; no tensor yet."""
    is_gguf = path.is_file() and path.suffix == ".gguf"
    if load_format == "gguf" and not is_gguf:
        raise ConfigError(f"load_format='gguf' needs a .gguf file, got {path}")
    if load_format == "safetensors" and is_gguf:
        raise ConfigError(f"load_format='safetensors' needs a directory, got {path}")
    return GGUFCheckpoint(path) if is_gguf else HFCheckpoint(path)


class HFCheckpoint:
    """A directory with config.json and safetensors, single or sharded."""

    def __init__(self, path: Path) -> None:
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path} holds no config.json; give a model directory or a .gguf file")
        self.path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self.dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ModelNotSupported(f"{path}/config.json: dtype {self.dtype!r} is not supported")
        if quantization := self.config.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise ModelNotSupported(f"{path} is quantised ({method}); use an unquantised version or a GGUF file")

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)

    def tensors(self) -> Iterator[LazyTensor]:
        for file in self._weight_files():
            try:
                shard = safe_open(file, framework="pt")  # open for as long as a tensor refers to it
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    shape = tuple(shard.get_slice(name).get_shape())
                    yield LazyTensor(name, shape, functools.partial(shard.get_tensor, name))
            except SafetensorError as error:
                raise WeightError(f"{file} is damaged ({error}); fetch it again") from error

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise WeightError(f"{index} holds no weight_map of tensors to files; fetch it again")
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name for name in names):
                raise WeightError(f"{index} names files outside its directory")
        else:
            # other files may hold the same weights again (consolidated.safetensors, model.fp16.safetensors)
            whole = self.path / "model.safetensors"
            files = [whole] if whole.is_file() else self.path.glob("*.safetensors")
            names = sorted(file.name for file in files)
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise WeightError(f"{self.path} lacks {', '.join(missing)}, named in its index; fetch it again")
        if not names:
            raise WeightError(f"{self.path} holds no *.safetensors file; convert the weights to safetensors")
        return [self.path / name for name in names]


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelNotFound(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise ModelNotFound(f"{file} holds no JSON object; fetch it again")
    return values
