"""Published quantised checkpoints for tests: written by the formats' definitions, with the weights that they stand for.

A writer gets a module's name and weight, and gives the module's tensors and what they mean: (code - zero) * scale.

PYTHONPATH=. python tests/published.py MODEL FOLDER        # writes FOLDER/awq, FOLDER/gptq, ... for benchmarks
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Writer = Callable[[str, np.ndarray], tuple[Tensors, torch.Tensor]]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


class Published(NamedTuple):
    """config: quantization_config. modules: a pattern of those that are quantised."""

    config: dict[str, Any]
    write: Writer
    modules: str = r".*(_proj|\.w[123]|query_key_value|dense\w*|Wqkv|shared_mlp\.\w+)"


def publish(model: Path, folder: Path, how: Published) -> tuple[Path, Path]:
    """From a model in float32: (quantised, the same with the weights that this stands for)."""
    quantised, plain = folder / "quantised", folder / "plain"
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module == name or not re.fullmatch(how.modules, module):
            stored[name] = meant[name] = weight
            continue
        tensors, values = how.write(module, weight.numpy())
        meant[name] = values.contiguous()
        stored |= {f"{module}.{last}": tensor.contiguous() for last, tensor in tensors.items()}
    assert stored.keys() != meant.keys()
    for path, tensors, extra in ((quantised, stored, {"quantization_config": how.config}), (plain, meant, {})):
        path.mkdir(parents=True)
        for file in model.glob("*.json"):
            shutil.copy(file, path)
        config = json.loads((model / "config.json").read_text())
        config["dtype"] = "bfloat16"
        (path / "config.json").write_text(json.dumps(config | extra))
        # two files, between which a weight's tensors may be parted
        names = sorted(tensors, key=lambda name: zlib.crc32(name.encode()))
        for i in range(2):
            save_file({name: tensors[name] for name in names[i::2]}, path / f"model-{i}.safetensors")
    return quantised, plain


# --- the numbers ----------------------------------------------------------------------------------------


def in_integers(weight, bits: int, groups, *, symmetric: bool, dtype=HALF):
    """groups: of each column. -> codes [out, in] and zeros [out, groups], from 0 on, and scales [out, groups]."""
    most, count = 2**bits - 1, groups.max() + 1
    scales, zeros = np.empty((len(weight), count)), np.full((len(weight), count), 2 ** (bits - 1))
    for g in range(count):
        mine = weight[:, groups == g]
        low, high = np.minimum(mine.min(1), 0), np.maximum(mine.max(1), 0)
        scales[:, g] = np.maximum(high, -low) * 2 / most if symmetric else (high - low) / most
        if not symmetric:
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 0, most)
    kept = torch.from_numpy(scales).to(dtype)
    codes = np.clip(np.round(weight / kept.double().numpy()[:, groups]) + zeros[:, groups], 0, most).astype(int)
    meant = (codes - zeros[:, groups]) * kept.double().numpy()[:, groups]
    return codes, zeros, kept, torch.from_numpy(meant).float()


def words(numbers: np.ndarray, bits: int, order=None) -> torch.Tensor:
    """int32 [..., n / 32 * bits]: number i of those that share a word at its bits from bits * i on."""
    together = numbers.reshape(*numbers.shape[:-1], -1, 32 // bits)
    together = together if order is None else together[..., order]
    packed = sum(together[..., i].astype(np.uint32) << np.uint32(bits * i) for i in range(32 // bits))
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def plain_groups(cols: int, size: int) -> np.ndarray:
    return np.arange(cols) // (cols if size == -1 else size)


def shuffled_groups(cols: int, size: int, seed: str) -> np.ndarray:
    return plain_groups(cols, size)[np.random.default_rng(zlib.crc32(seed.encode())).permutation(cols)]


def input_of(module: str) -> str:
    """Modules that read the same have the same."""
    return re.sub(r"[qkv]_proj|gate_proj|up_proj", "in", module)


# --- the formats ------------------------------------------------------------------------------------------


def awq(size: int, *, stores_zeros: bool = True) -> Published:
    def write(module, weight):
        groups = plain_groups(weight.shape[1], size)
        codes, zeros, scales, meant = in_integers(weight, 4, groups, symmetric=not stores_zeros)
        tensors = {"qweight": words(codes.T, 4, AWQ_ORDER), "scales": scales.t()}
        if stores_zeros:
            tensors["qzeros"] = words(zeros.T, 4, AWQ_ORDER)
        return tensors, meant

    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": stores_zeros, "version": "gemm"}
    return Published(config, write)


def gptq(bits: int, size: int, *, symmetric=True, desc_act=False, v2=False, shared=True, head=False) -> Published:
    """shared: whether modules that read the same have the same order of columns."""

    def write(module, weight):
        cols = weight.shape[1]
        seed = input_of(module) if shared else module
        groups = shuffled_groups(cols, size, seed) if desc_act else plain_groups(cols, size)
        codes, zeros, scales, meant = in_integers(weight, bits, groups, symmetric=symmetric)
        stored = zeros if v2 else zeros - 1 & 2**bits - 1
        return {
            "qweight": words(codes, bits).t(),
            "qzeros": words(stored.T, bits),
            "scales": scales.t(),
            "g_idx": torch.from_numpy(groups).int(),
        }, meant

    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": desc_act}
    if v2:
        config["checkpoint_format"] = "gptq_v2"
    modules = Published._field_defaults["modules"] + ("|lm_head" if head else "")
    return Published(config, write, modules)


def compressed(layout: str, weights: dict[str, Any], **config: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **config,
    }


def packed(bits: int, size: int, *, symmetric=True, dtype=BRAIN, actorder=None) -> Published:
    def write(module, weight):
        rows, cols = weight.shape
        groups = shuffled_groups(cols, size, input_of(module)) if actorder else plain_groups(cols, size)
        codes, zeros, scales, meant = in_integers(weight, bits, groups, symmetric=symmetric, dtype=dtype)
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, cols]),
        }
        if actorder:
            tensors["weight_g_idx"] = torch.from_numpy(groups).int()
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).t()
        return tensors, meant

    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "actorder": actorder, **strategy}
    return Published(compressed("pack-quantized", weights), write)


def integers(*, symmetric: bool = True, dtype=BRAIN) -> Published:
    """W8A8."""

    def write(module, weight):
        groups = plain_groups(weight.shape[1], -1)
        codes, zeros, scales, meant = in_integers(weight, 8, groups, symmetric=symmetric, dtype=dtype)
        tensors = {"weight": torch.from_numpy(codes - 128).to(torch.int8), "weight_scale": scales}
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros - 128).to(torch.int8)
        return tensors, meant

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    return Published(compressed("int-quantized", weights), write)


def in_floats(weight, rows: int, cols: int, dtype=SINGLE):
    """e4m3 with a scale for so many rows and columns."""
    a, b = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
    scales = torch.empty(a, b, dtype=dtype)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape)
    for i in range(a):
        for j in range(b):
            at = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            block = torch.from_numpy(weight[at])
            scales[i, j] = block.abs().max() / 448
            codes[at] = (block / scales[i, j].float()).to(torch.float8_e4m3fn)
            meant[at] = codes[at].float() * scales[i, j].float()
    return codes, scales, meant


def fp8(block: tuple[int, int] | None) -> Published:
    """block None: a scale a tensor."""

    def write(module, weight):
        codes, scales, meant = in_floats(weight, *(block or weight.shape))
        if block is not None:
            return {"weight": codes, "weight_scale_inv": scales}, meant
        return {"weight": codes, "weight_scale": scales[0, 0], "input_scale": torch.tensor(0.5)}, meant

    activations = {"activation_scheme": "dynamic" if block else "static"}
    config = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"], **activations}
    return Published(config | ({"weight_block_size": list(block)} if block else {}), write)


def floats(strategy: str) -> Published:
    def write(module, weight):
        rows, cols = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": (128, 128)}[strategy]
        codes, scales, meant = in_floats(weight, rows, cols, BRAIN)
        return {"weight": codes, "weight_scale": scales.reshape(1) if strategy == "tensor" else scales}, meant

    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    return Published(compressed("float-quantized", weights), write)


SCHEMES = {
    "awq-128": awq(128),
    "awq-64": awq(64),
    "awq-32-symmetric": awq(32, stores_zeros=False),
    "gptq-4": gptq(4, 128),
    "gptq-4-act-order": gptq(4, 64, symmetric=False, desc_act=True),
    "gptq-4-act-orders": gptq(4, 32, desc_act=True, shared=False),
    "gptq-8-v2-head": gptq(8, 128, symmetric=False, v2=True, head=True),
    "gptq-4-whole-rows": gptq(4, -1, desc_act=True),
    "w4a16": packed(4, 128),
    "w4a16-asymmetric": packed(4, 32, symmetric=False, dtype=HALF),
    "w4a16-act-order": packed(4, 64, actorder="group"),
    "w8a16": packed(8, -1, dtype=SINGLE),
    "w8a16-asymmetric": packed(8, 32, symmetric=False),
    "w8a8": integers(),
    "w8a8-asymmetric": integers(symmetric=False),
    "ct-fp8-tensor": floats("tensor"),
    "ct-fp8-channel": floats("channel"),
    "ct-fp8-block": floats("block"),
    "fp8-block": fp8((128, 128)),
    "fp8-tensor": fp8(None),
}

FORMATS = {  # in groups that divide SmolLM2's 576 columns
    "awq": awq(64),
    "gptq": gptq(4, 64),
    "gptq-desc-act": gptq(4, 64, desc_act=True),
    "w8a8": integers(),
    "fp8": fp8((128, 128)),
}


def publish_all(name: str, folder: str) -> None:
    """A model that `bench.py --model` takes, in each of the formats."""
    from benchmarks import models

    with tempfile.TemporaryDirectory() as scratch:
        exported = models.find(name, "float32", Path(scratch), export=True, random=False).paths["hf"]
        for scheme, how in FORMATS.items():
            quantised, _ = publish(Path(exported), Path(scratch, scheme), how)
            shutil.move(quantised, Path(folder, scheme))
            print(Path(folder, scheme))


if __name__ == "__main__":
    publish_all(*sys.argv[1:])
