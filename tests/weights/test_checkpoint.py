"""Hugging Face directories: whole, sharded and damaged ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanovllm.errors import ConfigError, ModelNotFound, ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.weights.checkpoint import HFCheckpoint, open_checkpoint
from nanovllm.weights.gguf import GGUFCheckpoint

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.zeros(2, 2, dtype=torch.float16),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path) -> Path:
    """config.json and one safetensors file."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(directory) -> Path:
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        weight_map[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, directory / weight_map[name])
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def set_config(directory: Path, **config) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in HFCheckpoint(directory).tensors():
        assert tensor.name not in found
        found[tensor.name] = tensor.load()
        assert tuple(found[tensor.name].shape) == tensor.shape
    return found


def assert_tensors(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_single_file(directory):
    assert_tensors(read_all(directory))


def test_shards(sharded):
    assert_tensors(read_all(sharded))


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    assert_tensors(read_all(sharded))


def test_files_that_the_index_does_not_name_are_left_alone(sharded):
    save_file({"stray": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert_tensors(read_all(sharded))


def test_tensors_can_be_loaded_after_the_walk(sharded):
    """The loader may keep them: they hold their file open."""
    kept = list(HFCheckpoint(sharded).tensors())
    assert_tensors({tensor.name: tensor.load() for tensor in kept})


def test_a_real_directory(tiny_model):
    path = tiny_model("llama")
    found, wanted = read_all(path), load_file(path / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks model-1\.safetensors,"):
        read_all(sharded)


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightError, match="safetensors"):
        read_all(directory)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_cannot_reach_outside_its_directory(sharded, name):
    save_file({"x": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    (sharded / "sub").mkdir()
    save_file({"x": torch.zeros(1)}, sharded / "sub" / "model.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightError):
        read_all(sharded)


@pytest.mark.parametrize(
    "index",
    [[], {}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": ["b"]}}, {"weight_map": {}}],
    ids=str,
)
def test_an_index_of_another_form_is_our_error(sharded, index):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(NanoVLLMError):
        read_all(sharded)


@pytest.mark.parametrize("size", [0, 4, 8, 40, 120, -1])
def test_a_truncated_file_is_named(directory, size):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        read_all(directory)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[bytes, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    set_config(folder)
    save_file(TENSORS, folder / "model.safetensors")
    return (folder / "model.safetensors").read_bytes(), folder


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 10**6), value=st.integers(0, 255), size=st.none() | st.integers(0, 10**6))
def test_damaged_files_raise_our_errors_alone(damaged, at, value, size):
    whole, folder = damaged
    changed = bytearray(whole)
    changed[at % len(whole)] = value
    (folder / "model.safetensors").write_bytes(changed[: None if size is None else size % len(whole)])
    try:
        for tensor in HFCheckpoint(folder).tensors():
            tensor.load()
    except NanoVLLMError:
        pass


def test_a_directory_without_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe{}", b"[" * 100000])
def test_a_config_that_is_no_json_object(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_checkpoint(directory)


def test_quantised_directories_are_refused_by_method(directory):
    set_config(directory, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelNotSupported, match="awq"):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", ["fp8", {}, None])
def test_other_quantization_configs(directory, value):
    """null and {} mean none; a bare name is refused like any other."""
    set_config(directory, quantization_config=value)
    if value:
        with pytest.raises(ModelNotSupported, match="fp8"):
            open_checkpoint(directory)
    else:
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_dtype_of_either_generation(directory, config, dtype):
    set_config(directory, **config)
    assert open_checkpoint(directory).dtype == dtype


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", 5, ["float32"]])
def test_other_dtypes_are_refused(directory, dtype):
    set_config(directory, dtype=dtype)
    with pytest.raises(ModelNotSupported, match="dtype"):
        open_checkpoint(directory)


def test_generation_config_is_read_where_there_is_one(directory):
    assert open_checkpoint(directory).generation_config == {}
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(directory).generation_config == {"eos_token_id": [1, 2]}


def test_the_format_follows_the_files(directory, smollm2_path):
    assert isinstance(open_checkpoint(directory), HFCheckpoint)
    assert isinstance(open_checkpoint(directory, "safetensors"), HFCheckpoint)
    assert isinstance(open_checkpoint(smollm2_path), GGUFCheckpoint)
    assert isinstance(open_checkpoint(smollm2_path, "gguf"), GGUFCheckpoint)


def test_a_format_that_the_files_do_not_have_is_a_config_error(directory, smollm2_path):
    with pytest.raises(ConfigError, match="load_format='gguf'"):
        open_checkpoint(directory, "gguf")
    with pytest.raises(ConfigError, match="load_format='safetensors'"):
        open_checkpoint(smollm2_path, "safetensors")


def test_reading_the_small_files_reads_no_tensor(sharded):
    for file in sharded.glob("*.safetensors"):
        shutil.copyfile("/dev/null", file)
    assert open_checkpoint(sharded).config["architectures"] == ["LlamaForCausalLM"]


def test_weights_in_another_layout_beside_the_model_are_not_read(tiny_model, tmp_path):
    """Some repositories keep consolidated.safetensors beside model.safetensors."""
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    names = {t.name for t in HFCheckpoint(tmp_path).tensors()}
    (tmp_path / "consolidated.safetensors").write_bytes(b"not to be opened")
    assert {t.name for t in HFCheckpoint(tmp_path).tensors()} == names
