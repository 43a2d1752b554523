"""GGUF files: metadata, tensors and the names and shapes that Hugging Face gives them.

The header is parsed here: `gguf.GGUFReader` takes seconds over a tokenizer's token list, which
would be most of the start-up. Dequantisation is the `gguf` package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanovllm.errors import ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from nanovllm.tokenizer.tokenizer import Tokenizer
from nanovllm.weights.tensor_source import LazyTensor

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32, _F16, _BF16 = 0, 1, 30
_PLAIN = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}
_CHUNK_BYTES = 1 << 18  # of quantised data at a time: the temporaries stay in the cache

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """One GGUF file as if it were a Hugging Face directory; see `weights.checkpoint`."""

    def __init__(self, path: Path) -> None:
        """Raises WeightError for a file that is not GGUF, and ModelNotSupported by architecture."""
        self.path = path
        self._file = _GGUFFile(path)
        self._arch = str(self.metadata.get("general.architecture"))
        if self._arch not in _ARCHITECTURES:
            raise ModelNotSupported(
                f"{path.name}: GGUF architecture {self._arch!r} is not supported; "
                f"supported: {', '.join(_ARCHITECTURES)}"
            )
        self.generation_config: dict[str, Any] = {}
        self.dtype = self._float_type()
        self.config = self._hf_config()

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
        for name, info in self._file.tensors.items():
            if name == "rope_freqs.weight":
                continue  # part of the config, see _rope_scaling
            hf_name = _hf_name(name)
            load = functools.partial(self._load, name)
            yield LazyTensor(hf_name, info.shape, load)

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._file.read(name)
        if self._arch == "llama" and (match := re.search(r"\.attn_([qk])\.", name)):
            heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            if len(tensor) % (2 * heads):
                raise WeightError(f"{self.path}: the {len(tensor)} rows of {name} are not pairs of {heads} heads")
            tensor = _unpermute(tensor, heads)
        return tensor

    def _float_type(self) -> str:
        """float32 or float16 if all matrices are; quantised files count as bfloat16."""
        kinds = {info.kind for info in self._file.tensors.values() if len(info.shape) > 1}
        return {frozenset({_F32}): "float32", frozenset({_F16}): "float16"}.get(frozenset(kinds), "bfloat16")

    def _hf_config(self) -> dict[str, Any]:
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise WeightError(f"{self.path} lacks the tensor token_embd.weight")
        heads = self._count("attention.head_count")
        hidden = self._count("embedding_length")
        head_dim = self._count("attention.key_length", self._count("rope.dimension_count", hidden // heads))
        return {
            "architectures": [_ARCHITECTURES[self._arch]],
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim),
            "attention_bias": "blk.0.attn_q.bias" in self._file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._file.tensors,
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._eos_ids(),
        }

    def _eos_ids(self) -> list[int]:
        names = ("eos", "eot", "eom")  # end of sequence, of turn, of message
        return [i for i in map(self._token_id, names) if i is not None]

    def _token_id(self, name: str) -> int | None:
        token_id = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and not isinstance(token_id, int):
            raise WeightError(f"{self.path}: the GGUF metadata has {name}_token_id={token_id!r}")
        return token_id

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        factors = self._file.tensors.get("rope_freqs.weight")
        if factors is not None:  # llama3 scaling, already worked out
            if factors.shape != (head_dim // 2,):
                raise WeightError(f"{self.path}: rope_freqs.weight is {factors.shape}, should be {(head_dim // 2,)}")
            return {"rope_type": "factors", "factors": self._file.read("rope_freqs.weight").tolist()}
        kind = self._value("rope.scaling.type", "none")
        return None if kind == "none" else {"rope_type": kind, "factor": self._number("rope.scaling.factor")}

    def _count(self, key: str, *default: int) -> int:
        value = self._value(key, *default)
        if not isinstance(value, int) or value < 1:
            raise WeightError(f"{self.path}: the GGUF metadata has {key}={value!r}, not a positive integer")
        return value

    def _number(self, key: str, *default: float) -> float:
        value = self._value(key, *default)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise WeightError(f"{self.path}: the GGUF metadata has {key}={value!r}, not a positive number")
        return value

    def _value(self, key: str, *default: Any) -> Any:
        full = f"{self._arch}.{key}"
        if full not in self.metadata and not default:
            raise WeightError(f"{self.path}: the GGUF metadata lacks {full!r}")
        return self.metadata.get(full, *default)


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _TENSORS:
        return name  # left as it is, for the loader to refuse by name
    prefix = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{prefix}{_TENSORS[match[2]]}.{match[3]}"


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's interleaving of rotary pairs: rows (head, pair, half) back to (head, half, pair)."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


class _TensorInfo:
    __slots__ = ("kind", "offset", "shape")

    def __init__(self, shape: tuple[int, ...], kind: int, offset: int) -> None:
        self.shape, self.kind, self.offset = shape, kind, offset


class _GGUFFile:
    """The parsed header over a memory map."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
            raise WeightError(f"cannot read {path}: {error}") from error
        self._path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, _TensorInfo] = {}
        try:
            self._parse()
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise WeightError(f"{path} is not a whole GGUF file (damaged header: {error!r}); fetch it again") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised; float32 unless it is stored as float16 or bfloat16."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.kind)
        except ValueError:
            raise WeightError(f"{self._path}: tensor {name} has unknown GGML type {info.kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block:
            raise WeightError(
                f"{self._path}: rows of {info.shape[-1]} in tensor {name} are not whole {kind.name} blocks"
            )
        size = math.prod(info.shape) // block * block_bytes
        start = self._data_start + info.offset
        if start + size > len(self._map):
            raise WeightError(f"{self._path} is cut short: tensor {name} ends beyond the file; fetch it again")
        raw = np.frombuffer(self._map, dtype=np.uint8, count=size, offset=start)
        if info.kind in _PLAIN:
            plain = torch.from_numpy(raw.copy()).view(_PLAIN[info.kind])
            return plain.view(info.shape)
        rows = raw.reshape(-1, info.shape[-1] // block * block_bytes)
        return _dequantize(rows, kind, info.shape)

    def _parse(self) -> None:
        magic, version, num_tensors, num_values = self._unpack("<4sIQQ", 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise WeightError(f"{self._path} is not a GGUF file of version 2 or 3")
        at = 24
        for _ in range(num_values):
            key, at = self._string(at)
            (kind,) = self._unpack("<I", at)
            self.metadata[key], at = self._value(kind, at + 4)
        for _ in range(num_tensors):
            name, at = self._string(at)
            (num_dims,) = self._unpack("<I", at)
            if not 1 <= num_dims <= 4:
                raise IndexError(f"{num_dims} dimensions")
            *dims, kind, offset = self._unpack(f"<{num_dims}QIQ", at + 4)
            if 0 in dims:
                raise IndexError("an empty tensor")
            self.tensors[name] = _TensorInfo(tuple(reversed(dims)), kind, offset)
            at += 4 + 8 * num_dims + 12
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise IndexError(f"alignment {alignment!r}")
        self._data_start = -(-at // alignment) * alignment

    def _unpack(self, form: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(form, self._map, at)

    def _string(self, at: int) -> tuple[str, int]:
        (size,) = self._unpack("<Q", at)
        if at + 8 + size > len(self._map):
            raise IndexError("a string ends beyond the file")
        return self._map[at + 8 : at + 8 + size].decode(), at + 8 + size

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            form = "<" + _SCALARS[kind]
            return self._unpack(form, at)[0], at + struct.calcsize(form)
        item, count = self._unpack("<IQ", at)
        at += 12
        if item in _SCALARS:
            form = f"<{count}{_SCALARS[item]}"
            return list(self._unpack(form, at)), at + struct.calcsize(form)
        values = []
        for _ in range(count):
            value, at = self._value(item, at)
            values.append(value)
        return values, at


def _dequantize(rows: np.ndarray, kind: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Quantised rows to float32, in pieces whose temporaries fit a core's cache (twice as fast
    as whole tensors; threads gain nothing, they wait for the interpreter)."""
    from gguf.quants import dequantize

    out = np.empty((rows.shape[0], shape[-1]), dtype=np.float32)
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    try:
        for start in range(0, len(rows), step):
            out[start : start + step] = dequantize(rows[start : start + step], kind)
    except NotImplementedError as error:
        raise ModelNotSupported(f"GGML type {kind.name} cannot be dequantised: {error}") from error
    return torch.from_numpy(out).view(shape)
