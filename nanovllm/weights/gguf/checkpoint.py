"""GGUFCheckpoint: one GGUF file as if it were a Hugging Face directory."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nanovllm.errors import ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.quantization.blocks import Blocks
from nanovllm.quantization.ggml import KINDS, GGMLBlocks
from nanovllm.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.gguf.config import ROPE_TABLES, GGUFKeys
from nanovllm.weights.gguf.falcon import FALCON, FALCON_TWO_NORMS
from nanovllm.weights.gguf.family import Family, Undo
from nanovllm.weights.gguf.file import GGUFFile
from nanovllm.weights.gguf.gemma3 import GEMMA3
from nanovllm.weights.gguf.gpt2 import GPT2
from nanovllm.weights.gguf.granite import GRANITE, GRANITE_HYBRID, GRANITE_MOE
from nanovllm.weights.gguf.llama import LLAMA, QWEN2, QWEN3, QWEN3_MOE
from nanovllm.weights.tensor_source import LazyTensor

_FAMILIES = {
    "falcon": FALCON,
    "gemma3": GEMMA3,
    "gpt2": GPT2,
    "granite": GRANITE,
    "granitehybrid": GRANITE_HYBRID,
    "granitemoe": GRANITE_MOE,
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
}
_NAME = re.compile(r"(blk\.(\d+)\.|)(\w+)(?:\.(\d+))?(\.weight|\.bias|)")  # layer, module, expert, parameter
_Part = tuple[str, int | None]  # a tensor of the file, or its slice for one expert


class GGUFCheckpoint:
    """Hugging Face's names, shapes, values and config; see `weights.checkpoint`."""

    def __init__(self, path: Path) -> None:
        """Raises WeightError for a file that is not GGUF, and ModelNotSupported by architecture."""
        self.path = path
        self.load_format = "gguf"
        self._file = GGUFFile(path)
        keys = GGUFKeys(self._file)
        self._family = _family(keys)
        self.generation_config: dict[str, Any] = {}
        self.dtype = self._file.float_type()
        quantized = any(self._file.quantized_kind(name) for name in self._file.tensors)
        self.quantization = "gguf" if quantized else None
        self.config = self._family.config(keys)

    @property
    def metadata(self) -> dict[str, Any]:
        return self._file.metadata

    def load_tokenizer(self) -> Tokenizer:
        try:
            return tokenizer_from_gguf(self.metadata)
        except NanoVLLMError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise WeightError(f"{self.path}: the tokenizer in the GGUF metadata is damaged: {error!r}") from error

    def tensors(self) -> Iterator[LazyTensor]:
        """WeightError for a file that is cut short, before any tensor, and for impossible shapes."""
        names = [name for name in self._file.tensors if name not in ROPE_TABLES]
        for name in names:
            self._file.locate(name)
        for name in names:
            yield from self._hf_tensors(name)

    def _hf_tensors(self, name: str) -> Iterator[LazyTensor]:
        """What a tensor of the file becomes: one, several experts, or nothing if it is a second half."""
        match, family = _NAME.fullmatch(name), self._family
        prefix, layer, module, expert, parameter = match.groups() if match else ("", None, name, None, "")
        hf_name = _hf_name(family, layer, module if expert is None else f"{module}_exps", parameter)
        undo = family.undo.get(module)
        if hf_name is None:
            if module not in family.joined.values():
                yield self._lazy(name, [(name, None)], None)  # for the loader to refuse by name
        elif "{e}" not in hf_name:
            second = family.joined.get(module)
            halves = [name] if second is None else [name, f"{prefix}{second}{parameter}"]
            yield self._lazy(hf_name, [(half, None) for half in halves], undo)
        elif expert is not None:  # as the first Mixtral files have them
            yield self._lazy(hf_name.format(e=expert), [(name, None)], undo)
        else:
            for e in range(self._file.tensors[name].shape[0]):
                yield self._lazy(hf_name.format(e=e), [(name, e)], undo)

    def _lazy(self, hf_name: str, parts: Sequence[_Part], undo: Undo | None) -> LazyTensor:
        """The shape is what the conversion makes of tensors without data."""
        try:
            empty = [torch.empty(self._shape(part), device="meta") for part in parts]
            shape = tuple(self._converted(empty, undo).shape)
            transposed = len(shape) == 2 and self._converted([e[:, :1] for e in empty], undo).shape[0] == 1
        except (RuntimeError, IndexError) as error:
            raise WeightError(f"{self.path}: the shape of {parts[0][0]} does not fit the metadata: {error}") from error
        kinds = {self._file.quantized_kind(name) for name, _ in parts}
        kind = kinds.pop() if len(kinds) == 1 and len(shape) > 1 else None
        load = functools.partial(self._load, parts, undo)
        if kind not in KINDS:
            return LazyTensor(hf_name, shape, load, kind)
        load_blocks = functools.partial(self._load_blocks, parts, undo, kind, transposed)
        return LazyTensor(hf_name, shape, load, kind, load_blocks, transposed)

    def _shape(self, part: _Part) -> tuple[int, ...]:
        name, expert = part
        if name not in self._file.tensors:
            raise WeightError(f"{self.path} lacks the tensor {name}")
        shape = self._file.tensors[name].shape
        return shape if expert is None else shape[1:]

    def _load(self, parts: Sequence[_Part], undo: Undo | None) -> torch.Tensor:
        return self._converted([self._file.read(*part) for part in parts], undo)

    def _load_blocks(
        self, parts: Sequence[_Part], undo: Undo | None, kind: str, transposed: bool, device: str
    ) -> Blocks:
        data = self._converted([self._file.read_bytes(*part, device=device) for part in parts], undo)
        rows = data.t() if transposed else data.flatten(0, -2)
        return GGMLBlocks(kind, rows, self._shape(parts[0])[-1])

    def _converted(self, tensors: list[torch.Tensor], undo: Undo | None) -> torch.Tensor:
        tensor = torch.cat(tensors, dim=-2) if len(tensors) > 1 else tensors[0]
        return tensor if undo is None else undo(tensor, self.config)


def _family(keys: GGUFKeys) -> Family:
    if keys.arch not in _FAMILIES:
        raise ModelNotSupported(
            f"{keys.file.path.name}: GGUF architecture {keys.arch!r} is not supported; "
            f"supported: {', '.join(_FAMILIES)}"
        )
    if keys.arch == "falcon" and keys.has_tensor(".attn_norm_2.weight"):
        return FALCON_TWO_NORMS
    return _FAMILIES[keys.arch]


def _hf_name(family: Family, layer: str | None, module: str, parameter: str) -> str | None:
    whole = family.names.get(f"{module}{parameter}")  # without a parameter, or with one that has another name
    name = whole if whole is not None else family.names.get(module)
    if name is None:
        return None
    prefix = "" if layer is None else family.layer.format(layer) + "."
    return prefix + name + ("" if whole is not None else parameter)
