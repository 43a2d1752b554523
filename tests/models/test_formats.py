"""The same weights from every file format that a family is published in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from nanovllm.build_context import BuildContext
from nanovllm.models.base import CausalLM
from nanovllm.models.registry import model_class
from nanovllm.weights.checkpoint import open_checkpoint


def loaded(path: Path) -> CausalLM:
    checkpoint = open_checkpoint(path)
    cls = model_class(checkpoint.config["architectures"])
    ctx = BuildContext(torch.device("cpu"), torch.float32, 64)
    model = cls(cls.config_class.from_hf(checkpoint.config), ctx)
    model.load(checkpoint)
    return model


def save_shards(tensors: dict[str, torch.Tensor], path: Path, save, pattern: str) -> None:
    """Three files and their index."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = pattern.format(i + 1)
        part = {name: tensors[name] for name in names[i::3]}
        save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = pattern.replace("-{:05}-of-00003", "") + ".index.json"
    (path / index).write_text(json.dumps({"weight_map": weight_map}))


def convert(source: Path, path: Path, form: str) -> Path:
    """Write the model again in another format; the path to open."""
    (path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    if form == "safetensors-sharded":
        save_shards(tensors, path, save_file, "model-{:05}-of-00003.safetensors")
    elif form == "bin":
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        save_shards(tensors, path, torch.save, "pytorch_model-{:05}-of-00003.bin")
    return path


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("family", TINY)
def test_every_format_gives_the_same_weights(tiny_model, tmp_path, family, form):
    expected = dict(loaded(tiny_model(family)).named_parameters())
    found = dict(loaded(convert(tiny_model(family), tmp_path, form)).named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
