"""GGUF files: against the `gguf` package on the real model, and on files written here."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanovllm.attention.reference import ReferenceAttention
from nanovllm.build_context import BuildContext
from nanovllm.errors import ModelNotSupported, NanoVLLMError, WeightError
from nanovllm.layers.rotary_embedding import inverse_frequencies
from nanovllm.models.registry import model_class
from nanovllm.weights.checkpoint import HFCheckpoint
from nanovllm.weights.gguf import GGUFCheckpoint
from nanovllm.weights.loader import load_weights

Kind = GGMLQuantizationType
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


# --- writing -------------------------------------------------------------------------------


def gguf_name(hf_name: str) -> str:
    module, _, parameter = hf_name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{GGUF_NAMES[match[2]]}.{parameter}"
    return f"{GGUF_NAMES[module]}.{parameter}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's: of each head, the two halves that rotate together are interleaved."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# Where fp16 numbers lie in a block that cannot be made by `quantize`: the rest may be anything.
SCALES_AT = {Kind.Q4_K: [0, 2], Kind.Q6_K: [208]}


def stored(values: np.ndarray, kind: Kind, random: np.random.Generator) -> np.ndarray:
    """What a file holds for a matrix, row by row; of K-quants random bytes with sane scales."""
    if kind in (Kind.F32, Kind.F16):
        return values.astype(np.float32 if kind == Kind.F32 else np.float16)
    if kind not in SCALES_AT:
        return quantize(values, kind)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (len(values) * values.shape[1] // block, size), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        blocks[:, at : at + 2] = random.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)


def write_gguf(
    model: Path,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    arch: str | None = None,
    rope_freqs: list[float] | None = None,
    with_tokens: int = 0,
    **metadata: float | str,
) -> dict[str, torch.Tensor]:
    """Convert a Hugging Face directory as llama.cpp does; returns the weights the file stands for."""
    config = json.loads((model / "config.json").read_text())
    arch = arch or config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_bos_token_id(config["bos_token_id"])
    for key, value in metadata.items():
        key = key.replace("__", ".").replace("ARCH", arch)
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key, value)
    if with_tokens:
        writer.add_token_list([f"token {i}" for i in range(with_tokens)])
        writer.add_token_scores([float(i) for i in range(with_tokens)])
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, dtype=np.float32))
    expected = {}
    random = np.random.default_rng(0)
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.numpy()
        data = stored(values, kind, random) if values.ndim == 2 else values
        expected[name] = torch.from_numpy(dequantize(data, kind) if data.dtype == np.uint8 else data.astype(np.float32))
        if arch == "llama" and (match := re.search(r"\.([qk])_proj\.", name)):
            data = permute(data, config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"])
        raw_dtype = kind if data.dtype == np.uint8 else None
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(data), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def read_all(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in GGUFCheckpoint(path).tensors():
        found[tensor.name] = tensor.load()
        assert tuple(found[tensor.name].shape) == tensor.shape
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=0, atol=0, msg=name)


def model_config(checkpoint):
    return model_class(checkpoint.config["architectures"]).config_class.from_hf(checkpoint.config)


# --- the real model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return GGUFCheckpoint(smollm2_path)


@pytest.fixture(scope="module")
def reader(smollm2_path):
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
    config = model_config(smollm2)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rope.theta, config.rope.scaling) == (100000.0, {"rope_type": "default"})
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings and not config.attention_bias and not config.mlp_bias
    assert smollm2.dtype == "bfloat16"
    assert smollm2.config["eos_token_id"] == [2]


def test_metadata_is_that_of_the_gguf_package(smollm2, reader):
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert smollm2.metadata.keys() == fields.keys()
    for name, field in fields.items():
        if len(field.data) < 1000:
            assert smollm2.metadata[name] == field.contents()
        else:
            assert len(smollm2.metadata[name]) == len(field.data)
            assert smollm2.metadata[name][-3:] == field.contents(slice(-3, None))


# --- written files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Rows of 256, as K-quants need them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    made = {arch: tmp_path_factory.mktemp(arch) for arch in ("llama", "qwen3")}
    for arch, path in made.items():
        make_tiny_model(arch, path, **sizes)
    return made


KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q6_K]
DTYPES = {Kind.F32: "float32", Kind.F16: "float16"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_config_and_weights_come_back(wide_model, tmp_path, arch, kind):
    expected = write_gguf(wide_model[arch], tmp_path / "m.gguf", kind)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert_same(read_all(tmp_path / "m.gguf"), expected)
    assert checkpoint.dtype == DTYPES.get(kind, "bfloat16")
    wanted, found = model_config(HFCheckpoint(wide_model[arch])), model_config(checkpoint)
    assert found.rms_norm_eps == pytest.approx(wanted.rms_norm_eps)  # stored in 32 bits
    assert dataclasses.replace(found, rms_norm_eps=wanted.rms_norm_eps) == wanted


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3"])
def test_a_model_loads_the_same_from_either_format(tiny_model, tmp_path, family):
    """Odd head sizes, biases, one KV head, tied and untied heads."""
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model(family), path, Kind.F32)
    models = []
    for checkpoint in (HFCheckpoint(tiny_model(family)), GGUFCheckpoint(path)):
        cls = model_class(checkpoint.config["architectures"])
        ctx = BuildContext(torch.device("cpu"), torch.float32, ReferenceAttention(), 64)
        models.append(cls(model_config(checkpoint), ctx))
        load_weights(models[-1], checkpoint.tensors(), models[-1].weight_rules)
    for one, other in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_tied_where_the_file_has_none(tmp_path, tied):
    make_tiny_model("llama", tmp_path, tie_word_embeddings=tied, num_hidden_layers=1)
    write_gguf(tmp_path, tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert checkpoint.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in {t.name for t in checkpoint.tensors()}) is not tied


def test_rope_freqs_are_llama3_scaling(tiny_model, tmp_path):
    """The tensor is no weight: it becomes part of the config."""
    hf = model_config(HFCheckpoint(tiny_model("llama3")))
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = []
    for frequency in plain:  # as llama.cpp's converter works them out
        wavelength = 2 * math.pi / frequency
        smooth = min(1.0, max(0.0, (64 / wavelength - 1.0) / (4.0 - 1.0)))
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len(set(factors)) > 2
    expected = write_gguf(tiny_model("llama3"), tmp_path / "m.gguf", rope_freqs=factors)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    torch.testing.assert_close(inverse_frequencies(16, model_config(checkpoint).rope), inverse_frequencies(16, hf.rope))
    assert_same(read_all(tmp_path / "m.gguf"), expected)


def test_rope_freqs_of_the_wrong_length_are_refused(tiny_model, tmp_path):
    write_gguf(tiny_model("llama3"), tmp_path / "m.gguf", rope_freqs=[1.0] * 7)
    with pytest.raises(WeightError, match=r"rope_freqs.weight is \(7,\), should be \(8,\)"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_linear_rope_scaling(tiny_model, tmp_path):
    scaling = {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 4.0}
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", **scaling)
    rope = model_config(GGUFCheckpoint(tmp_path / "m.gguf")).rope
    assert rope.scaling == {"rope_type": "linear", "factor": 4.0}


def test_end_tokens_of_several_kinds(tiny_model, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama"), path)
    checkpoint = GGUFCheckpoint(path)
    assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (0, [1])
    checkpoint.metadata["tokenizer.ggml.eot_token_id"] = 7
    assert checkpoint._eos_ids() == [1, 7]


# --- files that are wrong ------------------------------------------------------------------


def test_an_unknown_architecture_is_named(tiny_model, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", arch="mamba")
    with pytest.raises(ModelNotSupported, match=r"m\.gguf.*'mamba'.*llama, qwen3"):
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
    freqs = [1.0, 1.5, 2.0, 4.0]
    scaling = {"ARCH__rope__scaling__type": "none", "ARCH__rope__scaling__factor": 2.0}
    write_gguf(folder, path, Kind.Q8_0, rope_freqs=freqs, with_tokens=5, **scaling)
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
        checkpoint = GGUFCheckpoint(path)
    except NanoVLLMError:
        return
    for tensor in checkpoint.tensors():
        try:
            with np.errstate(all="ignore"):  # garbage for scales overflows
                assert tuple(tensor.load().shape) == tensor.shape
        except NanoVLLMError:
            continue


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
    tensor = next(t for t in GGUFCheckpoint(path).tensors() if t.name == "model.embed_tokens.weight")
    with pytest.raises(error, match=r"F64|token_embd.*999"):
        tensor.load()
