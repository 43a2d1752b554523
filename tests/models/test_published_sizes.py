"""Published sizes give the published number of parameters: a wrong default or a forgotten bias shows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from published_sizes import PUBLISHED

from benchmarks.models import SHAPES
from nanovllm.build_context import BuildContext
from nanovllm.layers.weight_layer import WeightLayer
from nanovllm.models.registry import model_class

ROUNDED = ("mosaicml/mpt-30b", "tiiuae/falcon-11B", "tiiuae/falcon-180B", "ibm-granite/granite-4.0-h")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    architecture, config, published = PUBLISHED[name]
    cls = model_class([architecture])
    ctx = BuildContext(torch.device("meta"), torch.bfloat16, 64)
    model = cls(cls.config_class.from_hf(config), ctx)
    layers = (layer for layer in model.modules() if isinstance(layer, WeightLayer))
    found = sum(
        math.prod(s) for layer in layers for shards in layer.expected_weights().values() for s in shards.values()
    )
    assert found == pytest.approx(published, rel=0.003 if name.startswith(ROUNDED) else 0)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "openai-community/gpt2"),
        ("granite-4.0-h-350m", "ibm-granite/granite-4.0-h-350m"),
    ],
)
def test_the_shapes_of_benchmarks(shape, name):
    architecture, config, _ = PUBLISHED[name]
    ours = model_class(SHAPES[shape]["architectures"]).config_class.from_hf(SHAPES[shape])
    theirs = model_class([architecture]).config_class.from_hf(config)
    lengths = {"max_position_embeddings", "rope", "intermediate_size", "eos_token_id", "bos_token_id"}
    for field in {f.name for f in dataclasses.fields(ours)} - lengths:
        assert getattr(ours, field) == getattr(theirs, field), field
