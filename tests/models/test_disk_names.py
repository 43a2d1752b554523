"""Every tensor on disk of every family is needed, has one shape, and is told by its name."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import TINY

from nanovllm.build_context import BuildContext
from nanovllm.errors import WeightError
from nanovllm.models.registry import model_class
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm.weights.loader import load_weights
from nanovllm.weights.rules import Rename
from nanovllm.weights.tensor_source import LazyTensor


@pytest.fixture(params=TINY)
def family(request, tiny_model):
    """The tensors on disk, problem(tensors) -> the message, known_as(name) -> the name after renaming."""
    checkpoint = open_checkpoint(tiny_model(request.param))
    cls = model_class(checkpoint.config["architectures"])
    ctx = BuildContext(torch.device("cpu"), torch.float32, 64)
    model = cls(cls.config_class.from_hf(checkpoint.config), ctx)

    def problem(tensors: list[LazyTensor]) -> str:
        with pytest.raises(WeightError) as caught:
            load_weights(model, tensors, model.weight_rules)
        return str(caught.value).removeprefix("the weights do not fit the model: ")

    def known_as(name: str) -> str:
        for rule in model.weight_rules:
            if isinstance(rule, Rename):
                name = re.sub(rule.pattern, rule.replacement, name, count=1)
        return name

    return list(checkpoint.tensors()), problem, known_as


def test_each_missing_unexpected_and_misshapen_tensor_is_named(family):
    tensors, problem, known_as = family
    for i, tensor in enumerate(tensors):
        others = tensors[:i] + tensors[i + 1 :]
        assert problem(others) == f"1 missing: {known_as(tensor.name)}"
        for shape in ((tensor.shape[0] + 1, *tensor.shape[1:]), ()):
            wrong = LazyTensor(tensor.name, shape, lambda shape=shape: torch.zeros(shape))
            assert problem([wrong, *others]).startswith(f"1 misshapen: {tensor.name} (is {shape}, should ")
    for name in ("stray.weight", tensors[0].name):  # the second is there twice
        assert problem([*tensors, LazyTensor(name, (2,), lambda: torch.zeros(2))]) == f"1 unexpected: {name}"
