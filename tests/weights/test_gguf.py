"""GGUF files: against the `gguf` package on the real model and on files written here, and damaged ones."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from gguf_converter import Kind, convert, read_quickly
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_model

from nanovllm.errors import ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.weights.gguf import GGUFCheckpoint

TABLE = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 30)


def gguf_name(hf_name: str) -> str:
    return TABLE.get_name(hf_name, try_suffixes=(".weight", ".bias"))


def read_all(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in GGUFCheckpoint(path).tensors():
        found[tensor.name] = tensor.load()
        assert tuple(found[tensor.name].shape) == tensor.shape
    return found


# --- the real model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return GGUFCheckpoint(smollm2_path)


@pytest.fixture(scope="module")
def reader(smollm2_path):
    with read_quickly():
        return gguf.GGUFReader(smollm2_path)


def test_smollm2_tensors_are_those_of_the_gguf_package(smollm2, reader):
    found = {tensor.name: tensor for tensor in smollm2.tensors()}
    heads = {"q": 9, "k": 3}
    assert len(found) == len(reader.tensors)
    names = {gguf_name(name): name for name in found}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if match := re.search(r"attn_([qk])\.", tensor.name):
            # as transformers undoes it
            pairs = values.reshape(heads[match[1]], len(values) // heads[match[1]] // 2, 2, -1)
            values = pairs.swapaxes(2, 1).reshape(values.shape)
        mine = found[names[tensor.name]]
        loaded = mine.load()
        assert tuple(loaded.shape) == mine.shape == values.shape
        assert np.array_equal(loaded.float().numpy(), values), tensor.name


def test_smollm2_config(smollm2):
    """1e-5 is stored in 32 bits, and was 9.999999747378752e-06 for us."""
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2],
    }
    assert smollm2.config == expected
    assert smollm2.dtype == "bfloat16"


def test_metadata_is_that_of_the_gguf_package(smollm2, reader):
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert smollm2.metadata.keys() == fields.keys()
    for name, field in fields.items():
        if len(field.data) < 1000:
            assert smollm2.metadata[name] == field.contents()
        else:
            assert len(smollm2.metadata[name]) == len(field.data)
            assert smollm2.metadata[name][-3:] == field.contents(slice(-3, None))


# --- types of tensors -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Rows of 256, as K-quants need them; nothing of a Qwen 3 is rearranged."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("wide"), **sizes)


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K]
DTYPES = {Kind.F32: "float32", Kind.F16: "float16"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_those_of_the_gguf_package(wide_model, tmp_path, kind):
    path = convert(wide_model, tmp_path / "m.gguf", kind)
    assert GGUFCheckpoint(path).dtype == DTYPES.get(kind, "bfloat16")
    expected = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    found = read_all(path)
    assert {gguf_name(name) for name in found} == expected.keys()
    for name, tensor in found.items():
        assert np.array_equal(tensor.float().numpy(), expected[gguf_name(name)]), name


def test_end_tokens_of_several_kinds(tiny_model, tmp_path):
    path = convert(tiny_model("llama"), tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=7)
    config = GGUFCheckpoint(path).config
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 7])


# --- files that are wrong ------------------------------------------------------------------


def test_an_unknown_architecture_is_named(tiny_model, tmp_path):
    convert(tiny_model("llama"), tmp_path / "m.gguf", arch="mamba")
    with pytest.raises(ModelNotSupported, match=r"m\.gguf.*'mamba'.*llama, qwen2, qwen3"):
        GGUFCheckpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGUF" + b"\0" * 20,
        b"\x93NUMPY" + b"\0" * 100,
        b"GGUF\x01" + b"\0" * 60,
        b"{}" * 500,
        b"\xff" * 99,
    ],
    ids=["empty", "magic alone", "version 0", "numpy", "version 1", "text", "ones"],
)
def test_what_is_no_gguf_file_is_a_weight_error_with_its_path(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightError, match=re.escape(str(path))):
        GGUFCheckpoint(path)


def test_a_file_that_is_not_there_is_a_weight_error(tmp_path):
    with pytest.raises(WeightError, match=r"absent\.gguf"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> tuple[bytes, int, Path]:
    """A whole file, where its data start, and a path to write damaged copies to."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "num_hidden_layers": 1}
    make_tiny_model("llama", folder, **sizes)
    path = folder / "m.gguf"
    more = {
        "ARCH__rope__scaling__type": "none",
        "ARCH__rope__scaling__factor": 2.0,
        "tokenizer__ggml__tokens": [f"token {i}" for i in range(5)],
        "tokenizer__ggml__scores": [float(i) for i in range(5)],
        "tokenizer__ggml__add_bos_token": True,
    }
    freqs = {"rope_freqs.weight": np.array([1.0, 1.5, 2.0, 4.0], dtype=np.float32)}
    convert(folder, path, Kind.Q8_0, tensors=freqs, **more)
    start = gguf.GGUFReader(path).data_offset
    return path.read_bytes(), start, folder / "damaged.gguf"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_truncated_headers(small_file, share):
    data, start, path = small_file
    path.write_bytes(data[: int(start * share)])
    with pytest.raises(WeightError, match=re.escape(str(path))):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.99])
def test_truncated_data(small_file, share):
    """A download that stopped half-way must not become a model with garbage at its end."""
    data, start, path = small_file
    path.write_bytes(data[: start + int((len(data) - start) * share)])
    with pytest.raises(WeightError, match="cut short"):
        read_all(path)


def read_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        for tensor in GGUFCheckpoint(path).tensors():
            with np.errstate(all="ignore"):  # garbage for scales overflows
                assert tuple(tensor.load().shape) == tensor.shape
    except NanoVLLMError:
        pass


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_headers_raise_our_errors_alone(small_file, data):
    whole, start, path = small_file
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, start - 1))
        damaged[at] = data.draw(st.one_of(st.sampled_from([0, 1, 9, 0x7F, 0x80, 0xFF]), st.integers(0, 255)))
    read_or_refuse(path, bytes(damaged))


@settings(deadline=None, max_examples=150)
@given(cut=st.integers(0, 5000), length=st.integers(1, 40), insert=st.binary(max_size=8))
@example(cut=4, length=1, insert=b"")
def test_headers_with_bytes_lost_or_added_raise_our_errors_alone(small_file, cut, length, insert):
    whole, start, path = small_file
    cut %= start
    read_or_refuse(path, whole[:cut] + insert + whole[cut + length :])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6))
def test_files_cut_anywhere_raise_our_errors_alone(small_file, size):
    whole, _, path = small_file
    read_or_refuse(path, whole[: size % len(whole)])


INTEGERS = ["attention.head_count", "attention.head_count_kv", "embedding_length", "block_count", "context_length"]


@pytest.mark.parametrize("value", [b"\0\0\0\0", b"\xff\xff\xff\xff"], ids=["zero", "huge"])
@pytest.mark.parametrize("key", INTEGERS)
def test_absurd_sizes(small_file, key, value):
    whole, _, path = small_file
    at = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    read_or_refuse(path, whole[:at] + value + whole[at + 4 :])
    if value == b"\0\0\0\0":
        with pytest.raises(WeightError, match=key):
            GGUFCheckpoint(path)


def header(*entries: bytes, tensors: int = 0) -> bytes:
    return (
        b"GGUF"
        + np.array([3], "<u4").tobytes()
        + np.array([tensors, len(entries)], "<u8").tobytes()
        + b"".join(entries)
    )


def text(value: bytes) -> bytes:
    return np.array([len(value)], "<u8").tobytes() + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + np.array([kind], "<u4").tobytes() + value


ARCH = entry(b"general.architecture", 8, text(b"llama"))
NESTED = np.array([9], "<u4").tobytes() + np.array([1], "<u8").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        header(),
        header(ARCH),
        header(ARCH, tensors=1),
        header(entry(b"general.architecture", 4, b"\1\0\0\0")),
        header(entry(b"general.architecture", 9, np.array([8, 0, 0], "<u4").tobytes())),
        header(ARCH, entry(b"general.alignment", 4, b"\0\0\0\0")),
        header(ARCH, entry(b"general.alignment", 8, text(b"32"))),
        header(ARCH, entry(b"nested", 9, NESTED * 5000)),
        header(ARCH, entry(b"long", 9, np.array([10], "<u4").tobytes() + b"\xff" * 8)),
        header(ARCH, entry(b"kind", 99, b"")),
        header(ARCH, entry(b"\xff\xfe", 4, b"\0\0\0\0")),
        header(ARCH, entry(b"tensor", 0, b"\0"), tensors=2**40),
        header(ARCH, tensors=1) + text(b"token_embd.weight") + b"\0" * 16,
        header(ARCH, tensors=1) + text(b"token_embd.weight") + b"\1\0\0\0" + b"\0" * 20,
        header(ARCH, tensors=1) + text(b"token_embd.weight") + b"\xff" * 40,
    ],
    ids=[
        "nothing",
        "architecture alone",
        "tensors missing",
        "architecture is a number",
        "architecture is a list",
        "alignment 0",
        "alignment is text",
        "deeply nested arrays",
        "endless array",
        "unknown type",
        "key is not UTF-8",
        "absurd tensor count",
        "tensor without dimensions",
        "empty tensor",
        "absurd dimensions",
    ],
)
def test_crafted_headers_raise_our_errors(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(NanoVLLMError):
        GGUFCheckpoint(path)


def test_a_missing_key_is_named(small_file):
    whole, _, path = small_file
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.block_c0unt"))
    with pytest.raises(WeightError, match=r"llama\.block_count"):
        GGUFCheckpoint(path)


def test_an_unknown_tensor_keeps_its_name_for_the_loader(small_file):
    whole, _, path = small_file
    path.write_bytes(whole.replace(b"blk.0.ffn_up.weight", b"blk.0.fun_up.weight"))
    assert "blk.0.fun_up.weight" in {tensor.name for tensor in GGUFCheckpoint(path).tensors()}


@pytest.mark.parametrize(("kind", "error"), [(Kind.F64, ModelNotSupported), (999, WeightError)])
def test_tensor_types_that_cannot_be_read(small_file, kind, error):
    """The type of token_embd, a number behind its name and its two dimensions."""
    whole, _, path = small_file
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(whole[:at] + np.array([kind], "<u4").tobytes() + whole[at + 4 :] + b"\0" * 10000)
    with pytest.raises(error, match=r"F64|token_embd.*999"):
        read_all(path)


def test_a_tensor_of_that_name_twice(small_file):
    whole, _, path = small_file
    path.write_bytes(whole.replace(b"blk.0.ffn_up.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(WeightError, match=r"blk\.0\.attn_q\.weight twice"):
        GGUFCheckpoint(path)


def test_a_shape_that_does_not_fit_the_metadata(small_file):
    """Rows of 3 heads cannot be put back into pairs of halves."""
    whole, _, path = small_file
    at = whole.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    path.write_bytes(whole[:at] + b"\3\0\0\0" + whole[at + 4 :])
    with pytest.raises(WeightError, match=r"attn_q\.weight does not fit the metadata"):
        read_all(path)
