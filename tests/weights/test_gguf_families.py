"""GGUF files of each family, written as llama.cpp writes them, against the directories they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_converter import FAMILIES, Kind, convert
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported, WeightError
from nanovllm.layers.rotary_embedding import RopeConfig, inverse_frequencies
from nanovllm.models.registry import model_class
from nanovllm.weights.checkpoint import HFCheckpoint
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.loader import load_weights


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """directory("llama") -> of a saved model with these sizes."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family), **FAMILIES[family])
        return made[family]

    return get


def read_all(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for tensor in GGUFCheckpoint(path).tensors():
        assert tensor.name not in found
        found[tensor.name] = tensor.load()
        assert tuple(found[tensor.name].shape) == tensor.shape
    return found


def rounding(values: torch.Tensor, kind: Kind) -> float:
    """How far a value may be from the stored one; half of 1 / 127 of a block's largest for Q8_0."""
    largest = values.abs().max().item()
    return {Kind.F32: 0.0, Kind.F16: largest * 2**-11, Kind.Q8_0: largest / 127 * 0.52}[kind]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_values(directory, tmp_path, family, kind):
    expected = load_file(directory(family) / "model.safetensors")
    found = read_all(convert(directory(family), tmp_path / "m.gguf", kind))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # what was computed on the way here and back: 1 + weight, -exp(A_log)
        computed = family == "gemma3" or name.endswith("A_log")
        atol = max(rounding(tensor, kind), 2**-22 * tensor.abs().max().item() if computed else 0.0, 2e-7 * computed)
        torch.testing.assert_close(found[name].float(), tensor, rtol=0, atol=atol, msg=name)


NOT_IN_A_FILE = {"_name_or_path", "dtype", "eos_token_id", "initializer_range"}
LOST = {
    "falcon-7b": {"num_kv_heads", "num_ln_in_parallel_attn"},  # without meaning in this decoder
    "gpt2": {"n_inner"},  # None for four times n_embd
    "granite-hybrid": {"max_position_embeddings"},  # the converter writes 2**20
    "granite-hybrid-moe": {"max_position_embeddings"},
    "llama3": {"rope_parameters"},  # factors, already worked out
    "mixtral": {"head_dim"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_config(directory, tmp_path, family):
    """As transformers' class reads both, with all its defaults."""
    from transformers import AutoConfig

    hf = AutoConfig.from_pretrained(directory(family)).to_dict()
    checkpoint = GGUFCheckpoint(convert(directory(family), tmp_path / "m.gguf"))
    found = AutoConfig.for_model(**checkpoint.config).to_dict()
    keys = (hf.keys() & found.keys()) - NOT_IN_A_FILE - LOST.get(family, set())
    assert {key: found[key] for key in keys} == {key: hf[key] for key in keys}
    assert found["eos_token_id"] == [hf["eos_token_id"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loads_the_same_from_either_format(directory, tmp_path, family):
    models = []
    for checkpoint in (
        HFCheckpoint(directory(family)),
        GGUFCheckpoint(convert(directory(family), tmp_path / "m.gguf")),
    ):
        cls = model_class(checkpoint.config["architectures"])
        ctx = BuildContext(torch.device("cpu"), torch.float32, 64)
        models.append(cls(cls.config_class.from_hf(checkpoint.config), ctx))
        load_weights(models[-1], checkpoint.tensors(), models[-1].weight_rules)
    for one, other in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=2e-7, msg=one[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-40b", "granitemoe"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_tied_where_the_file_has_none(tmp_path, family, tied):
    make_tiny_model(family, tmp_path, **FAMILIES[family], tie_word_embeddings=tied)
    checkpoint = GGUFCheckpoint(convert(tmp_path, tmp_path / "m.gguf"))
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in {t.name for t in checkpoint.tensors()}) is not tied


# --- experts ---------------------------------------------------------------------------------


def test_an_expert_is_read_alone(directory, tmp_path, monkeypatch):
    """All of a layer's experts at once would need twice their memory."""
    from nanovllm.weights.gguf import file

    path = convert(directory("mixtral"), tmp_path / "m.gguf", Kind.Q8_0)
    sizes = []
    dequantize = file._dequantize
    monkeypatch.setattr(file, "_dequantize", lambda *args: sizes.append(args[2]) or dequantize(*args))
    next(
        t for t in GGUFCheckpoint(path).tensors() if t.name.endswith("layers.1.block_sparse_moe.experts.3.w2.weight")
    ).load()
    assert sizes == [(64, 96)]


def test_the_first_mixtral_files_have_a_tensor_for_each_expert(directory, tmp_path):
    new = GGUFCheckpoint(convert(directory("mixtral"), tmp_path / "new.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for key, value in new.metadata.items():
        if key.startswith("llama."):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for tensor in gguf.GGUFReader(tmp_path / "new.gguf").tensors:
        if "_exps" in tensor.name:
            for e, data in enumerate(tensor.data):
                writer.add_tensor(tensor.name.replace("_exps", f".{e}"), data)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old, expected = read_all(tmp_path / "old.gguf"), read_all(tmp_path / "new.gguf")
    assert old.keys() == expected.keys()
    assert all(torch.equal(old[name], expected[name]) for name in expected)


@pytest.mark.parametrize("lost", ["blk.1.ffn_up_exps.weight", "blk.2.ffn_up_shexp.weight"])
def test_half_of_a_joined_tensor_is_missing(directory, tmp_path, lost):
    path = convert(directory("granitemoe-shared"), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(lost.encode(), lost.replace("_up_", "_xx_").encode()))
    with pytest.raises(WeightError, match=f"lacks the tensor {lost}"):
        read_all(path)


# --- metadata --------------------------------------------------------------------------------


def config_with(directory: Path, tmp_path: Path, tensors: Any = None, **metadata: Any) -> dict[str, Any]:
    return GGUFCheckpoint(convert(directory, tmp_path / "m.gguf", tensors=tensors, **metadata)).config


def test_a_window_makes_llama_a_mistral(directory, tmp_path):
    assert config_with(directory("llama"), tmp_path)["architectures"] == ["LlamaForCausalLM"]
    config = config_with(directory("llama"), tmp_path, ARCH__attention__sliding_window=8)
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 8)


@pytest.mark.parametrize(
    ("metadata", "layers"),
    [
        ({}, "SSSSSFS"),
        ({"ARCH__attention__sliding_window_pattern": 2}, "SFSFSFS"),
        ({"ARCH__attention__sliding_window_pattern": [True, False, False, True, True, True, False]}, "SFFSSSF"),
        ({"ARCH__attention__sliding_window": 0}, "FFFFFFF"),
    ],
    ids=str,
)
def test_which_layers_of_gemma_slide(directory, tmp_path, metadata, layers):
    config = config_with(directory("gemma3"), tmp_path, **metadata)
    assert "".join(kind[0].upper() for kind in config["layer_types"]) == layers
    assert config["sliding_window"] == (20 if "S" in layers else None)


def test_a_sliding_pattern_for_other_layers(directory, tmp_path):
    with pytest.raises(WeightError, match="sliding_window_pattern is for 2 layers of 7"):
        config_with(directory("gemma3"), tmp_path, ARCH__attention__sliding_window_pattern=[True, False])


def test_gemma_27b_scales_its_queries_otherwise(directory, tmp_path):
    """llama.cpp tells the size by its 62 layers; no key says it."""
    assert config_with(directory("gemma3"), tmp_path)["query_pre_attn_scalar"] == 32  # of the head
    assert config_with(directory("gemma3"), tmp_path, ARCH__block_count=62)["query_pre_attn_scalar"] == 64 // 4


def test_granite_without_rope(directory, tmp_path):
    with pytest.raises(ModelNotSupported, match="'granite' without RoPE"):
        config_with(directory("granite"), tmp_path, ARCH__rope__scaling__finetuned=False)


@pytest.mark.parametrize("kv_heads", [2, [0, 2], [0, 0, 0], [0, -2, 1], ["0", "1", "0"]], ids=str)
def test_a_hybrid_must_say_which_layers_attend(directory, tmp_path, kv_heads):
    with pytest.raises(WeightError, match="names no key heads of each layer"):
        config_with(directory("granite-hybrid"), tmp_path, ARCH__attention__head_count_kv=kv_heads)


def test_mamba_heads_must_divide_its_width(directory, tmp_path):
    with pytest.raises(WeightError, match=r"ssm\.inner_size=128 is no multiple of 7 heads"):
        config_with(directory("granite-hybrid"), tmp_path, ARCH__ssm__time_step_rank=7)


def test_rope_over_a_part_of_the_head(directory, tmp_path):
    """llama.cpp refuses it for these families too; it would be other numbers without a word."""
    with pytest.raises(ModelNotSupported, match="RoPE over 8 of 16 dimensions"):
        config_with(directory("llama"), tmp_path, ARCH__rope__dimension_count=8)


# --- RoPE scalings ---------------------------------------------------------------------------


def rope_with(directory: Path, tmp_path: Path, tensors: Any = None, **metadata: Any) -> dict[str, Any] | None:
    metadata = {f"ARCH__rope__{key}": value for key, value in metadata.items()}
    return config_with(directory, tmp_path, tensors, **metadata)["rope_scaling"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"scaling__type": "none", "scaling__factor": 4.0}, None),
        ({"scaling__type": "linear", "scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.5}, {"rope_type": "linear", "factor": 2.5}),  # the key of the first files
        ({"scaling__factor": 0.0}, None),
        (
            {"scaling__type": "yarn", "scaling__factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
    ],
    ids=str,
)
def test_rope_scaling(directory, tmp_path, metadata, expected):
    assert rope_with(directory("llama"), tmp_path, **metadata) == expected


def test_rope_freqs_are_llama3_scaling(directory, tmp_path):
    """The tensor is no weight: it becomes part of the config."""
    hf = RopeConfig.from_hf(HFCheckpoint(directory("llama3")).config)
    factors = inverse_frequencies(16, RopeConfig(hf.theta, {"rope_type": "default"})) / inverse_frequencies(16, hf)
    path = convert(directory("llama3"), tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors.numpy()})
    found = RopeConfig.from_hf(GGUFCheckpoint(path).config)
    torch.testing.assert_close(inverse_frequencies(16, found), inverse_frequencies(16, hf))
    assert read_all(path).keys() == load_file(directory("llama3") / "model.safetensors").keys()


def test_longrope_has_two_tables(directory, tmp_path):
    long, short = np.arange(1, 9, dtype=np.float32), np.arange(1, 9, dtype=np.float32) / 4
    tables = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    metadata = {"scaling__type": "longrope", "scaling__original_context_length": 64, "scaling__attn_factor": 1.25}
    assert rope_with(directory("llama"), tmp_path, tables, **metadata) == {
        "rope_type": "longrope",
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    }


@pytest.mark.parametrize("metadata", [{"scaling__type": "longrope"}, {"scaling__type": "ntk"}], ids=str)
def test_rope_scalings_that_are_not_whole(directory, tmp_path, metadata):
    with pytest.raises(ModelNotSupported, match=f"RoPE scaling '{metadata['scaling__type']}'"):
        rope_with(directory("llama"), tmp_path, **metadata)


@pytest.mark.parametrize("name", ["rope_freqs", "rope_factors_long"])
def test_rope_tables_of_the_wrong_length(directory, tmp_path, name):
    with pytest.raises(WeightError, match=rf"{name}.weight is \(7,\), should be \(8,\)"):
        rope_with(directory("llama"), tmp_path, {f"{name}.weight": np.ones(7, dtype=np.float32)})
