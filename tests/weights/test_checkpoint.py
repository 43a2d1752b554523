"""Hugging Face directories: whole, sharded and damaged ones, of safetensors and of pickles."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanovllm.errors import ConfigError, ModelNotFound, ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.weights import shards
from nanovllm.weights.checkpoint import HFCheckpoint, open_checkpoint
from nanovllm.weights.gguf import GGUFCheckpoint

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.weight": torch.zeros(2, 2, dtype=torch.float16),
}
INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def directory(tmp_path) -> Path:
    """config.json and one safetensors file."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def pickled(tmp_path) -> Path:
    """config.json and one pickle."""
    (tmp_path / "config.json").write_text("{}")
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    return tmp_path


def make_shards(directory: Path, index: str, file: str, save: Any) -> Path:
    """One file for each tensor, named by its number, and their index."""
    weight_map = {name: file.format(i) for i, name in enumerate(TENSORS)}
    for name, place in weight_map.items():
        save({name: TENSORS[name]}, directory / place)
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


@pytest.fixture
def sharded(directory) -> Path:
    (directory / "model.safetensors").unlink()
    return make_shards(directory, INDEX, "model-{}.safetensors", save_file)


@pytest.fixture
def pickled_shards(pickled) -> Path:
    (pickled / "pytorch_model.bin").unlink()
    return make_shards(pickled, PICKLED_INDEX, "pytorch_model-{}.bin", torch.save)


@pytest.fixture(params=["safetensors", "pt"])
def any_shards(request) -> Path:
    return request.getfixturevalue("sharded" if request.param == "safetensors" else "pickled_shards")


def index_of(directory: Path) -> Path:
    return next(directory.glob("*.index.json"))


def set_config(directory: Path, **config) -> None:
    (directory / "config.json").write_text(json.dumps(config))


def read_all(directory: Path, load_format: str = "auto") -> dict[str, torch.Tensor]:
    found = {}
    for tensor in HFCheckpoint(directory, load_format).tensors():
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


def test_a_single_pickle(pickled):
    assert_tensors(read_all(pickled))


def test_shards(any_shards):
    assert_tensors(read_all(any_shards))


def test_shards_without_an_index(any_shards):
    index_of(any_shards).unlink()
    (any_shards / "training_args.bin").write_bytes(b"not to be opened")
    assert_tensors(read_all(any_shards))


def test_files_that_the_index_does_not_name_are_left_alone(sharded):
    save_file({"stray": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert_tensors(read_all(sharded))


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_tensors_can_be_loaded_after_the_walk(any_shards, monkeypatch, limit):
    """And again and again, whether a file stays mapped or is mapped anew each time."""
    monkeypatch.setattr(shards, "_MAPPED_BYTES", limit)
    kept = list(HFCheckpoint(any_shards).tensors())
    for _ in range(2):
        assert_tensors({tensor.name: tensor.load() for tensor in kept})


def test_shards_are_read_one_after_the_other(any_shards):
    places = list(json.loads(index_of(any_shards).read_text())["weight_map"].values())
    (any_shards / places[-1]).write_bytes(b"damaged")
    tensors = HFCheckpoint(any_shards).tensors()
    assert [next(tensors).name, next(tensors).name] == list(TENSORS)[:2]
    with pytest.raises(WeightError, match=f"{places[-1]} is damaged"):
        next(tensors)


def test_a_real_directory(tiny_model):
    path = tiny_model("llama")
    found, wanted = read_all(path), load_file(path / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_missing_shard_is_named(any_shards):
    file = sorted(set(json.loads(index_of(any_shards).read_text())["weight_map"].values()))[1]
    (any_shards / file).unlink()
    with pytest.raises(WeightError, match=f"lacks {file},"):
        read_all(any_shards)


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").unlink()
    (directory / "training_args.bin").write_bytes(b"pickle")
    with pytest.raises(WeightError, match=r"holds no \*\.safetensors or pytorch_model\*\.bin file"):
        read_all(directory)


OUTSIDE = ["../outside", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "..\\outside", "C:outside", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_cannot_reach_outside_its_directory(any_shards, name):
    torch.save({"x": torch.zeros(1)}, any_shards.parent / "outside")
    (any_shards / "sub").mkdir()
    save_file({"x": torch.zeros(1)}, any_shards / "sub" / "model.safetensors")
    index_of(any_shards).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightError, match=r"outside its directory|lacks"):
        read_all(any_shards)


def test_a_tensor_in_two_shards(any_shards):
    places = sorted(set(json.loads(index_of(any_shards).read_text())["weight_map"].values()))
    shutil.copy(any_shards / places[0], any_shards / places[2])
    with pytest.raises(WeightError, match=rf"a\.weight is in {places[0]} and again in {places[2]}"):
        read_all(any_shards)


def test_a_tensor_that_its_file_lacks(any_shards):
    index = json.loads(index_of(any_shards).read_text())
    file = index["weight_map"]["lost.weight"] = index["weight_map"]["b.weight"]
    index_of(any_shards).write_text(json.dumps(index))
    with pytest.raises(WeightError, match=rf"{file} lacks lost\.weight, named in the index"):
        read_all(any_shards)


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


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_a_header_that_lies_about_its_length(directory, length):
    file = directory / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        read_all(directory)


# --- pickles ---------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(pickled, zipped):
    marker = pickled / "marker"
    torch.save(TENSORS | {"x": RunsCode(marker)}, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightError, match=r"pytorch_model\.bin is damaged, or its pickle holds more"):
        read_all(pickled)
    assert not marker.exists()


@pytest.mark.parametrize("mapped", [True, False])
def test_parameters_lose_their_gradients(pickled, mapped):
    """Else what they are copied to would require them, and every step of the model record a graph."""
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in TENSORS.items()}
    torch.save(weights, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=mapped)
    found = read_all(pickled)
    assert_tensors(found)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_the_format_before_pytorch_1_6(pickled):
    torch.save(TENSORS, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_tensors(read_all(pickled))


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"model": {"a.weight": torch.ones(2)}},
        {"a.weight": torch.ones(2), "epoch": 3},
        {1: torch.ones(2)},
        {"a.weight": torch.eye(2).to_sparse()},
        {"a.weight": torch.empty(2, device="meta")},
        torch.ones(2),
        None,
    ],
    ids=["list", "nested", "number", "key", "sparse", "meta", "tensor", "none"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_other_things(pickled, content, zipped):
    torch.save(content, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightError, match=r"pytorch_model\.bin (is damaged|holds more)"):
        read_all(pickled)


@pytest.mark.parametrize("size", [0, 2, 10, 500, -100, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_named(pickled, size, zipped):
    file = pickled / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightError, match=r"pytorch_model\.bin is damaged"):
        read_all(pickled)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(deadline=None, max_examples=150)
@given(zipped=st.booleans(), at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_damaged_pickles_raise_our_errors_alone(tmp_path_factory, zipped, at, value):
    folder = tmp_path_factory.getbasetemp() / "damaged-pickle"
    folder.mkdir(exist_ok=True)
    set_config(folder)
    torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    changed = bytearray((folder / "pytorch_model.bin").read_bytes())
    changed[at % len(changed)] = value
    (folder / "pytorch_model.bin").write_bytes(changed)
    with contextlib.suppress(NanoVLLMError):
        read_all(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("save", [save_file, torch.save])
def test_tensors_that_are_no_floats(pickled, dtype, save):
    """Masks and position ids in old files are skipped by rules, so only loading them is an error."""
    (pickled / "pytorch_model.bin").unlink()
    tensors = {"a.weight": torch.ones(2), "mask": torch.ones(2).to(dtype)}
    save(tensors, pickled / ("model.safetensors" if save is save_file else "pytorch_model.bin"))
    found = {tensor.name: tensor for tensor in HFCheckpoint(pickled).tensors()}
    assert torch.equal(found["a.weight"].load(), torch.ones(2))
    with pytest.raises(WeightError, match=f"the tensor mask is {dtype}; weights must be floats"):
        found["mask"].load()


def test_safetensors_go_before_pickles(directory):
    torch.save({"other": torch.ones(1)}, directory / "pytorch_model.bin")
    assert_tensors(read_all(directory))
    assert_tensors(read_all(directory, "safetensors"))
    assert read_all(directory, "pt").keys() == {"other"}


def test_a_format_that_is_not_there(pickled, tmp_path):
    with pytest.raises(WeightError, match=r"holds no \*\.safetensors file"):
        read_all(pickled, "safetensors")


# --- config.json -----------------------------------------------------------------------------


def test_a_directory_without_config(directory):
    (directory / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b'"text"', b"\xff\xfe{}", b"[" * 100000])
def test_a_config_that_is_no_json_object(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("method", ["hqq", ["awq"], None])
def test_quantised_directories_are_refused_by_method(directory, method):
    set_config(directory, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelNotSupported, match=re.escape(f"is quantised ({method}), which is not supported (awq")):
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
    for load_format in ("safetensors", "pt"):
        with pytest.raises(ConfigError, match=f"load_format='{load_format}' needs a directory"):
            open_checkpoint(smollm2_path, load_format)


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
