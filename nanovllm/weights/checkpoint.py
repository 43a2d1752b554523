"""Checkpoint: a model's files, whatever their format, in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from nanovllm.errors import ConfigError, ModelNotFound, ModelNotSupported, WeightError
from nanovllm.json_file import read_json
from nanovllm.quantization.raw import Raw
from nanovllm.quantization.schemes import read_scheme
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.published import joined, plain
from nanovllm.weights.shards import read_shard
from nanovllm.weights.tensor_source import LazyTensor

# by load_format: the name of a single file, and the pattern of several without an index. Other files
# may hold the same weights again (consolidated.safetensors), or none (training_args.bin).
_FILES = {
    "safetensors": ("model.safetensors", "*.safetensors"),
    "pt": ("pytorch_model.bin", "pytorch_model*.bin"),
}


class Checkpoint(Protocol):
    """config, generation_config: as in Hugging Face's JSON files, either generation.
    dtype: "float32", "float16" or "bfloat16", of the weights on disk. quantization: the method that some of them are
    quantised by, one of config.STORED, or None. load_format: as asked for."""

    path: Path
    load_format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    dtype: str
    quantization: str | None

    def tensors(self) -> Iterator[LazyTensor]: ...

    def load_tokenizer(self) -> Tokenizer: ...


def open_checkpoint(path: Path, load_format: str = "auto") -> Checkpoint:
    """Read the small files of a directory or the header of a `.gguf` file; no tensor yet."""
    is_gguf = path.is_file() and path.suffix == ".gguf"
    if load_format == "gguf" and not is_gguf:
        raise ConfigError(f"load_format='gguf' needs a .gguf file, got {path}")
    if load_format in _FILES and is_gguf:
        raise ConfigError(f"load_format={load_format!r} needs a directory, got {path}")
    return GGUFCheckpoint(path) if is_gguf else HFCheckpoint(path, load_format)


class HFCheckpoint:
    """A directory with config.json and weights, single or sharded: safetensors, or else `.bin` files.

    load_format: "safetensors" or "pt" takes only these.
    """

    def __init__(self, path: Path, load_format: str = "auto") -> None:
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path} holds no config.json; give a model directory or a .gguf file")
        self.path = path
        self.load_format = load_format
        self._formats = {load_format: _FILES[load_format]} if load_format in _FILES else _FILES
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self.dtype = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ModelNotSupported(f"{path}/config.json: dtype {self.dtype!r} is not supported")
        # the second is what llm-compressor called it in 2024
        quantized = self.config.get("quantization_config") or self.config.get("compression_config")
        self._scheme = read_scheme(quantized, str(path)) if quantized else None
        self.quantization: str | None = None if self._scheme is None else self._scheme.method

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)

    def tensors(self) -> Iterator[LazyTensor]:
        """WeightError for files and tensors that are damaged, missing or there twice."""
        return plain(self._raws()) if self._scheme is None else joined(self._raws(), self._scheme)

    def _raws(self) -> Iterator[Raw]:
        weight_map, names = self._weight_files()
        found: dict[str, str] = {}
        for file in names:
            for tensor in read_shard(self.path / file):
                if tensor.name in found:
                    raise WeightError(f"{self.path}: {tensor.name} is in {found[tensor.name]} and again in {file}")
                found[tensor.name] = file
                yield tensor
            lost = [name for name, place in weight_map.items() if place == file and found.get(name) != file]
            if lost:
                raise WeightError(f"{self.path / file} lacks {', '.join(lost)}, named in the index; fetch it again")

    def _weight_files(self) -> tuple[dict[str, str], list[str]]:
        """({tensor: file} where there is an index, the files of the first format that is there)."""
        for whole, pattern in self._formats.values():
            weight_map = _read_index(self.path / f"{whole}.index.json")
            if weight_map:
                names = sorted(set(weight_map.values()))
            elif (self.path / whole).is_file():
                names = [whole]
            else:
                names = sorted(file.name for file in self.path.glob(pattern))
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise WeightError(f"{self.path} lacks {', '.join(missing)}, named in its index; fetch it again")
            if names:
                return weight_map, names
        patterns = " or ".join(pattern for _, pattern in self._formats.values())
        raise WeightError(
            f"{self.path} holds no {patterns} file; fetch it again, or convert the weights to safetensors"
        )


def _read_index(index: Path) -> dict[str, str]:
    """{tensor: file} of an index; empty if there is none. Names must be files beside it."""
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise WeightError(f"{index} holds no weight_map of tensors to files; fetch it again")
    for name in weight_map.values():
        if Path(name).name != name or "\\" in name or ":" in name or name == "..":
            raise WeightError(f"{index} names {name!r}, outside its directory")
    return weight_map
