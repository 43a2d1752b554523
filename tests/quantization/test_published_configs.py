"""What publishers' tools write beside the weights: settings that say nothing of them, old names, biases of zeros."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gguf_converter import FAMILIES
from published import SCHEMES, Published, awq, gptq, packed, publish
from test_published_formats import stored
from test_published_models import logits
from test_quantized_models import planned
from tiny_models import make_tiny_model

from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.quantization.schemes import read_scheme
from nanovllm.weights.checkpoint import open_checkpoint


def compressed(layout: str, weights: dict, inputs: dict | None = None, **config) -> dict:
    """As llm-compressor writes it, with every key."""
    every = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
    activations = inputs and every | inputs | {"dynamic": True, "observer": None}
    group = {
        "format": layout,
        "input_activations": activations,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": every | weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
        **config,
    }


GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False, "sym": True, "true_sequential": True}
AWQ = {"bits": 4, "group_size": 128, "quant_method": "awq", "zero_point": True, "modules_to_not_convert": None}
FLOATS = {"strategy": "channel", "type": "float"}
WRITTEN: dict[str, tuple[Published, dict]] = {
    "AutoAWQ": (awq(128), AWQ | {"version": "gemm"}),
    "AWQ, transformers 4": (
        awq(128),
        AWQ | {"version": "gemm", "backend": "autoawq", "do_fuse": False, "exllama_config": None},
    ),
    "AWQ, transformers 5": (
        awq(128),
        AWQ | {"version": "gemm", "format": "gemm", "backend": "auto", "sym": True, "desc_act": False, "meta": None},
    ),
    "AWQ, AutoAWQ's own names": (
        awq(128),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
    ),
    "AWQ, GPTQModel": (awq(128), AWQ | {"checkpoint_format": "gemm", "pack_dtype": "int32", "lm_head": False}),
    "AutoGPTQ": (
        gptq(4, 128),
        GPTQ
        | {"damp_percent": 0.1, "model_name_or_path": None, "model_file_base_name": "model", "static_groups": False},
    ),
    "GPTQ, transformers 4": (
        gptq(8, 128),
        GPTQ | {"bits": 8, "dataset": None, "exllama_config": {"version": 1}, "use_exllama": True, "tokenizer": None},
    ),
    "GPTQModel": (
        gptq(4, 128),
        GPTQ
        | {"checkpoint_format": "gptq", "dynamic": {"-:.*mlp.gate$": {}}, "lm_head": False, "pack_dtype": "int32"}
        | {"meta": {"quantizer": ["gptqmodel:4.0.0"], "damp_percent": 0.05, "true_sequential": True}},
    ),
    "FP8, Qwen": (
        SCHEMES["fp8-block"],
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "FP8, transformers 5": (
        SCHEMES["fp8-block"],
        {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128]}
        | {"modules_to_not_convert": ["lm_head"], "dequantize": False, "scale_fmt": "float", "expert_dtype": "fp8"},
    ),
    "AutoFP8": (
        SCHEMES["fp8-tensor"],
        {"activation_scheme": "static", "quant_method": "fp8", "ignored_layers": ["lm_head"], "kv_cache_scheme": None},
    ),
    "W4A16": (
        packed(4, 128),
        compressed("pack-quantized", {"num_bits": 4, "group_size": 128, "strategy": "group", "actorder": "weight"}),
    ),
    "W4A16, asymmetric": (
        SCHEMES["w4a16-asymmetric"],
        compressed("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False})
        | {"sparsity_config": {"format": "dense", "registry_requires_subclass": False, "sparsity_structure": "0:0"}},
    ),
    "W8A16": (SCHEMES["w8a16"], compressed("pack-quantized", {"strategy": "channel"})),
    "W8A8": (SCHEMES["w8a8"], compressed("int-quantized", {"strategy": "channel"}, {"strategy": "token"})),
    "W8A8, SparseML": (
        SCHEMES["w8a8"],
        compressed("int-quantized", {"strategy": "channel"}, {"strategy": "token"}, quantization_status="frozen"),
    ),
    "FP8-dynamic": (SCHEMES["ct-fp8-channel"], compressed("float-quantized", FLOATS, FLOATS | {"strategy": "token"})),
    "FP8, keys and values too": (
        SCHEMES["ct-fp8-tensor"],
        compressed("naive-quantized", FLOATS | {"strategy": "tensor"}, FLOATS | {"strategy": "tensor"})
        | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}},
    ),
}


@pytest.mark.parametrize("tool", WRITTEN)
def test_every_tools_settings_are_read(tmp_path, tool):
    how, config = WRITTEN[tool]
    meant = stored(tmp_path, how._replace(config=config))
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert tensor.name == "m.q_proj.weight" and torch.equal(tensor.load(), meant)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "w_bit": 3, "q_group_size": 128}, "w_bit=3 is not supported; supported: 4"),
        (AWQ | {"checkpoint_format": "gemv"}, "checkpoint_format='gemv' is not supported; supported: 'gemm', 'GEMM'"),
        (AWQ | {"backend": "llm-awq"}, "backend='llm-awq' is not supported; use a version that AutoAWQ wrote"),
        ({"load_in_8bit": True}, "m is quantised (no quant_method), which is not supported (awq, gptq, compressed-"),
        (
            compressed("int-quantized", {}, config_groups={"group_0": {"targets": ["Linear"], "weights": None}}),
            "m: quantization_config, config_groups, group_0: a group without weights is not supported; use a version",
        ),
        (compressed("int-quantized", {}, config_groups=["Linear"]), "it must hold settings of its own"),
        (
            compressed("int-quantized", {}, sparsity_config={"format": "sparse-24-bitmask"}),
            "m: quantization_config, sparsity_config: format='sparse-24-bitmask' is not supported; supported: 'dense'",
        ),
    ],
)
def test_a_refusal_names_the_place(config, message):
    with pytest.raises(ModelNotSupported, match=re.escape(message)):
        read_scheme(config, "m")


def changed(folder: Path, **config) -> Path:
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: v for key, v in (old | config).items() if v is not None}))
    return folder


def test_settings_by_the_name_of_2024(tmp_path):
    meant = stored(tmp_path, how := SCHEMES["w8a8"])
    changed(tmp_path, quantization_config=None, compression_config=how.config)
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert torch.equal(tensor.load(), meant)


@pytest.mark.parametrize("scheme", ["awq-128", "gptq-4", "w4a16", "w8a8", "fp8-block", "fp8-tensor"])
def test_settings_that_lie_elsewhere(tmp_path, scheme):
    """Of old AWQ and GPTQ files; what came of them was a list of all tensors that do not fit."""
    stored(tmp_path, SCHEMES[scheme])
    checkpoint = open_checkpoint(changed(tmp_path, quantization_config=None))
    message = r"m\.q_proj\.\w+ is of a quantised weight, but config.json has no quantization_config; write there what"
    with pytest.raises(ModelNotSupported, match=message):
        list(checkpoint.tensors())


def with_biases(number: float) -> Published:
    """For the layers of Qwen2 that have none."""
    how = gptq(4, 32)

    def write(module, weight):
        tensors, meant = how.write(module, weight)
        others = {} if re.search("[qkv]_proj", module) else {"bias": torch.full((len(weight),), number).half()}
        return tensors | others, meant

    return how._replace(write=write)


def test_biases_of_zeros_that_the_model_does_not_have(tmp_path):
    """AutoGPTQ gave one to every layer: loading was refused for them."""
    model = make_tiny_model("qwen2", tmp_path, **FAMILIES["qwen2"])
    zeros, without = publish(model, tmp_path / "zeros", with_biases(0.0))
    assert torch.equal(logits(zeros), logits(without))
    assert planned(zeros) > 0
    others, _ = publish(model, tmp_path / "others", with_biases(0.5))
    with pytest.raises(WeightError, match=r"unexpected: .*o_proj\.bias"):
        logits(others)


def test_a_scale_of_inputs_by_the_name_of_transformers(tmp_path):
    meant = stored(tmp_path, SCHEMES["fp8-tensor"], input_scale=None, activation_scale=torch.tensor(0.5))
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert torch.equal(tensor.load(), meant)
