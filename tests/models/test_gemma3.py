"""Gemma 3 in the files of the models that also see images, and its rounded embedding scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import all_logits

from nanovllm import LLM
from nanovllm.build_context import BuildContext
from nanovllm.models.gemma3 import Gemma3Config, Gemma3Model


@pytest.mark.parametrize("family", ["gemma3", "gemma3-untied"])
@pytest.mark.parametrize("prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_the_language_model_of_a_multimodal_file(tiny_model, tmp_path, family, prefixes):
    """Its config is nested, its tensors have a prefix (either generation's), others are left out."""
    path = tiny_model(family)
    body, head = prefixes
    tensors = {
        body + name.removeprefix("model.") if name.startswith("model.") else head + name: tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    outer = "model." if not head else ""
    tensors[f"{outer}vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.zeros(2)
    tensors[f"{outer}multi_modal_projector.mm_input_projection_weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((path / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    config["tie_word_embeddings"] = text.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompt = list(range(2, 40))
    with LLM(str(path), skip_tokenizer_init=True) as alone, LLM(str(tmp_path), skip_tokenizer_init=True) as inside:
        np.testing.assert_array_equal(all_logits(inside, prompt), all_logits(alone, prompt))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 55.5), (torch.float16, 55.4375), (torch.float32, 3072**0.5)]
)
def test_embedding_scale_is_rounded_to_the_dtype_of_the_weights(dtype, scale):
    sizes = {"num_hidden_layers": 1, "vocab_size": 8, "hidden_size": 3072, "intermediate_size": 8, "head_dim": 2}
    config = Gemma3Config.from_hf(sizes)
    model = Gemma3Model(config, BuildContext(torch.device("cpu"), dtype, 16))
    assert model._embed_scale == pytest.approx(scale, abs=1e-6)
