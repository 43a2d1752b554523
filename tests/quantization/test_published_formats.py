"""Weights of published checkpoints: their parts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import SCHEMES, Published, awq, compressed, gptq
from safetensors.torch import save_file

from nanovllm.errors import ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.weights.checkpoint import open_checkpoint

ROWS, COLS = 80, 384
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)


def stored(folder: Path, how: Published, **changes) -> torch.Tensor:
    """Write one weight; changes: of its tensors. Returns what it stands for."""
    weight = np.random.default_rng(0).normal(size=(ROWS, COLS)).astype(np.float32)
    tensors, meant = how.write("m.q_proj", weight)
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    folder.mkdir(exist_ok=True)
    save_file({f"m.q_proj.{name}": t.contiguous() for name, t in kept.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": how.config}))
    return meant


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{scheme: (its only tensor, what that stands for)}."""

    def write(name: str, how: Published):
        folder = tmp_path_factory.mktemp(name)
        meant = stored(folder, how)
        (tensor,) = open_checkpoint(folder).tensors()
        return tensor, meant

    return {name: write(name, how) for name, how in SCHEMES.items()}


@EACH_SCHEME
def test_a_weight_has_its_modules_name_and_its_values(written, scheme):
    tensor, meant = written[scheme]
    assert (tensor.name, tensor.shape) == ("m.q_proj.weight", (ROWS, COLS))
    assert torch.equal(tensor.load(), meant)
    assert torch.equal(tensor.load_blocks("cpu").dequantize(), meant)
    assert tensor.load_blocks("meta").shape == meant.shape


@EACH_SCHEME
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_rows_and_whole_groups_of_columns(written, scheme, data):
    tensor, meant = written[scheme]
    blocks = tensor.load_blocks("cpu")
    for _ in range(data.draw(st.integers(1, 3))):
        count = len(blocks)
        first = data.draw(st.integers(0, count - 1))
        numbers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9).map(torch.tensor))
        rows = data.draw(st.sampled_from([slice(first, data.draw(st.integers(first + 1, count))), numbers]))
        blocks, meant = blocks[rows], meant[rows]
    group = blocks.group
    first = data.draw(st.integers(0, COLS // group - 1)) * group
    part = slice(first, data.draw(st.integers(first // group + 1, COLS // group)) * group)
    mine = blocks.columns(part)
    if isinstance(mine, torch.Tensor):  # rounded, as columns in another order are
        assert "act-order" in scheme and torch.equal(mine, meant[:, part].bfloat16())
    else:
        assert torch.equal(mine.dequantize(), meant[:, part])


# --- refusals ----------------------------------------------------------------------------------------------

FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
INTEGER = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
CONFIGS = [
    ({"quant_method": "bitsandbytes"}, "is quantised (bitsandbytes), which is not supported (awq, gptq, compressed-"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv' is not supported"),
    ({"quant_method": "awq", "bits": 3, "group_size": 128}, "bits=3 is not supported; supported: 4"),
    ({"quant_method": "awq", "bits": 4}, "group_size=None is not supported; it must be a number of columns, or -1"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "backend": "llm-awq"}, "backend='llm-awq' is not supported"),
    ({"quant_method": "gptq", "bits": 2, "group_size": 128}, "bits=2 is not supported; supported: 4, 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": True}, "group_size=True is not supported"),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        "'marlin' is not supported",
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True}, "use a version without it"),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:x": {"bits": 8}}},
        "dynamic, other settings",
    ),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported; supported: 'e4m3'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=[128] is not supported; it must be rows"),
    (compressed("nvfp4-pack-quantized", FLOAT), "group_0: format='nvfp4-pack-quantized' is not supported"),
    (compressed("float-quantized", FLOAT | {"num_bits": 4}), "num_bits=4 is not supported; supported: 8"),
    (compressed("float-quantized", FLOAT | {"symmetric": False}), "symmetric=False is not supported"),
    (compressed("pack-quantized", FLOAT), "type='float' in format='pack-quantized' is not supported"),
    (compressed("pack-quantized", INTEGER | {"strategy": "tensor_group"}), "strategy='tensor_group' is not supported"),
    (compressed("pack-quantized", INTEGER, sparsity_config={"format": "sparse-24"}), "format='sparse-24' is not sup"),
    (compressed("pack-quantized", INTEGER, transform_config={"config_groups": {"a": 1}}), "transform_config: config_g"),
    (
        compressed("pack-quantized", INTEGER, quantization_status="calibration"),
        "quantization_status='calibration' is not sup",
    ),
    (compressed("pack-quantized", INTEGER, config_groups={}), "config_groups={} is not supported"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_unsupported_settings(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    with pytest.raises(ModelNotSupported, match=re.escape(message)):
        open_checkpoint(tmp_path)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


TENSORS = [
    ("awq-128", {"scales": None}, WeightError, "m.q_proj is quantised, but lacks scales"),
    ("awq-128", {"qweight": None}, WeightError, "m.q_proj is quantised, but lacks qweight"),
    ("awq-128", {"qzeros": ints(2, 10)}, WeightError, "m.q_proj.qzeros is (2, 10), should be (3, 10) by"),
    (
        "awq-128",
        {"scales": torch.zeros(3, 80)},
        WeightError,
        "scales is torch.float32; torch.float16 or",
    ),
    ("gptq-4-act-order", {"g_idx": None}, WeightError, "lacks g_idx"),
    ("gptq-4-act-order", {"g_idx": ints(COLS)}, WeightError, "m.q_proj: its columns' groups are not those"),
    ("gptq-4", {"g_idx": torch.arange(COLS).int() % 3}, WeightError, "m.q_proj: its columns' groups are not those"),
    ("w4a16", {"weight_shape": None}, WeightError, "lacks weight_shape"),
    ("w4a16-asymmetric", {"weight_zero_point": None}, WeightError, "lacks weight_zero_point"),
    ("w4a16-asymmetric", {"weight_scale": torch.zeros(80, 12)}, WeightError, "weight_scale is torch.float32"),
    (
        "w8a8",
        {"weight": torch.zeros(80, 384)},
        WeightError,
        "weight is torch.float32; torch.int8 is supported",
    ),
    ("awq-128", {"qweight": ints(5, 384, 10)}, WeightError, "m.q_proj.qweight is (5, 384, 10), should be a matrix"),
    ("fp8-block", {"weight_scale_inv": None}, WeightError, "lacks weight_scale_inv or weight_scale"),
    ("fp8-block", {"weight_scale_inv": torch.zeros(1, 1)}, WeightError, "is (1, 1), should be (1, 3) by"),
    ("fp8-tensor", {"weight_scale": torch.zeros(3)}, WeightError, "is (3,), should be (80, 1) by"),
    ("fp8-tensor", {"weight": torch.full((80, 384), float("nan")).to(torch.float8_e4m3fn)}, WeightError, "holds NaN"),
]


@pytest.mark.parametrize(("scheme", "changes", "error", "message"), TENSORS)
def test_tensors_that_do_not_fit_together(tmp_path, scheme, changes, error, message):
    stored(tmp_path, SCHEMES[scheme], **changes)
    with pytest.raises(error, match=re.escape(message)):
        [tensor.load() for tensor in open_checkpoint(tmp_path).tensors()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ["re:.*mlp.*"]}, "m.q_proj is quantised, but config.json does not tell how"),
        ({"ignore": ["re:m.q_.*"]}, "m.q_proj is quantised, though config.json says that it is not"),
        ({"group_size": 48}, "m.q_proj: groups of 48 columns are not supported; multiples of 32 are, and whole rows"),
    ],
)
def test_modules_of_compressed_tensors(tmp_path, change, message):
    stored(tmp_path, how := SCHEMES["w4a16-asymmetric"])
    config = json.loads(json.dumps(how.config))
    group = config["config_groups"]["group_0"]
    for key, value in change.items():
        {"targets": group, "ignore": config, "group_size": group["weights"]}[key][key] = value
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    with pytest.raises(NanoVLLMError, match=re.escape(message)):
        list(open_checkpoint(tmp_path).tensors())


def test_groups_by_name_go_before_those_by_class(tmp_path):
    meant = stored(tmp_path, how := SCHEMES["w8a16"])
    config = json.loads(json.dumps(how.config))
    other = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    mine = config["config_groups"]["group_0"] | {"targets": ["re:.*q_proj"]}
    config["config_groups"] = {"group_0": other, "group_1": mine}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert torch.equal(tensor.load(), meant)


def test_a_zero_of_none_and_a_stored_fifteen_are_one(tmp_path):
    """GPTQ stores zeros less one, in as many bits."""
    how = gptq(4, 128)
    stored(tmp_path, how, qzeros=torch.full((3, 10), -1, dtype=torch.int32))
    (tensor,) = open_checkpoint(tmp_path).tensors()
    assert tensor.load().min() == 0


def test_other_tensors_are_floats(tmp_path):
    stored(tmp_path, awq(128), bias=torch.zeros(80, dtype=torch.int32))
    weight, bias = sorted(open_checkpoint(tmp_path).tensors(), key=lambda tensor: tensor.name, reverse=True)
    weight.load()
    with pytest.raises(WeightError, match=r"q_proj\.bias is torch\.int32; weights must be floats"):
        bias.load()
