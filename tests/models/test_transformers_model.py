"""Models without a file here, through transformers' modules and our attention; and those refused."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_parity import GREEDY, TINY_TOLERANCE, Reference, all_logits, prompts_for

from nanovllm import LLM, ConfigError, ModelNotSupported, SamplingParams, WeightError
from nanovllm.build_context import BuildContext
from nanovllm.cache_spec import PagedKVSpec
from nanovllm.config import EngineConfig
from nanovllm.distributed.group import TPGroup
from nanovllm.engine.runner.memory_plan import footprint
from nanovllm.models import transformers_attention as seam
from nanovllm.models.transformers_model import TransformersConfig, TransformersForCausalLM

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 5, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "phi3": {"sliding_window": 20, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "starcoder2": {"sliding_window": 20, "norm_epsilon": 1e-3},
    "cohere2": {**MIXED, "logit_scale": 0.7},
    "glm": {"head_dim": 24},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 40},  # positions from a table, with an offset
    "deepseek_v2": {  # latent attention: values narrower than keys
        **EXPERTS,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "olmoe": EXPERTS,
    "nanochat": {"final_logit_softcapping": 0.5},
}


def tiny_config(kind: str, **options: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **{**SIZES, **options})


def save_model(config: Any, path: Path) -> Path:
    """A seeded random model in fp32, with nothing in it left at zero or one."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    path = save_model(tiny_config(request.param, **FAMILIES[request.param]), tmp_path_factory.mktemp(request.param))
    return path, Reference(path)


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    return save_model(tiny_config("olmo2"), tmp_path_factory.mktemp("olmo2"))


def run(path: Path, **options: Any) -> LLM:
    return LLM(str(path), skip_tokenizer_init=True, **options)


def difference(llm: LLM, reference: Reference, token_ids: list[int]) -> float:
    return float(np.abs(all_logits(llm, token_ids) - reference.logits(token_ids)).max())


def test_all_logits(tiny):
    path, reference = tiny
    with run(path) as llm:
        for prompt in prompts_for(128):
            assert difference(llm, reference, prompt) < TINY_TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_batched_tokens": 13, "max_num_seqs": 5}, id="chunked"),
        pytest.param({"num_kvcache_blocks": 20, "kvcache_block_size": 8}, id="preempted"),
        pytest.param(
            {"max_num_seqs": 1, "enable_prefix_caching": False, "attention_backend": "reference"}, id="alone, uncached"
        ),
    ],
)
def test_greedy_text(tiny, options):
    path, reference = tiny
    prompts = prompts_for(128)
    expected = [reference.greedy(p) for p in prompts]
    with run(path, **options) as llm:
        assert [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected
        again = llm.generate(prompts[::-1], GREEDY, use_tqdm=False)
        assert [o["token_ids"] for o in again] == expected[::-1]
        assert any(o.num_cached_tokens for o in again) == options.get("enable_prefix_caching", True)
        if "num_kvcache_blocks" in options:
            assert llm.engine.stats.preemptions > 0


def test_prompt_logprobs(tiny):
    """Of every position, through the head that transformers scales or caps."""
    path, reference = tiny
    prompt = prompts_for(128)[3]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with run(path, max_num_batched_tokens=10, max_num_seqs=2) as llm:
        found = llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs
    expected = torch.from_numpy(reference.logits(prompt)).log_softmax(-1).numpy()
    for position, token in enumerate(prompt[1:]):
        assert found[position + 1][token].logprob == pytest.approx(expected[position, token], abs=TINY_TOLERANCE)


def test_seeded_text_is_the_same_alone_and_in_any_batch(olmo2):
    prompts = prompts_for(128)
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(len(prompts))]
    with run(olmo2) as llm:
        alone = [llm.generate(p, s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params, strict=True)]
        together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == alone and len({tuple(t) for t in alone}) == len(prompts)


@pytest.mark.parametrize("family", ["llama3", "granite", "gemma3", "mixtral"])
def test_the_same_as_our_own_file(tiny_model, family):
    prompts = prompts_for(128)
    path = tiny_model(family)
    with run(path, model_impl="nanovllm") as ours, run(path, model_impl="transformers") as theirs:
        assert isinstance(theirs.engine._executor._runner.model, TransformersForCausalLM)
        for prompt in prompts:
            assert np.abs(all_logits(ours, prompt) - all_logits(theirs, prompt)).max() < TINY_TOLERANCE
        texts = [[o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] for llm in (ours, theirs)]
        assert texts[0] == texts[1]


def test_who_is_chosen(olmo2, tiny_model, caplog):
    with run(olmo2) as llm:
        assert isinstance(llm.engine._executor._runner.model, TransformersForCausalLM)
    told = [r for r in caplog.records if "no file here runs Olmo2ForCausalLM" in r.message]
    assert [r.levelno for r in told] == [logging.WARNING]
    caplog.clear()
    with run(tiny_model("llama")) as llm:
        assert type(llm.engine._executor._runner.model).__name__ == "LlamaForCausalLM"
    assert "no file here" not in caplog.text
    with pytest.raises(ModelNotSupported, match=r"Olmo2ForCausalLM is not supported with model_impl='nanovllm'.*Llama"):
        run(olmo2, model_impl="nanovllm")


@pytest.mark.parametrize("max_model_len", [64, 65, 200])
def test_longrope_keeps_the_frequencies_of_max_model_len(tmp_path, max_model_len):
    """transformers chooses them by the longest position of the batch, and a cached key would not fit any more."""
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    path = save_model(config, tmp_path)
    expected = copy.deepcopy(rope)
    key = "short_factor" if max_model_len == 64 else "long_factor"
    expected["short_factor"] = expected["long_factor"] = rope[key]
    fixed = tiny_config("phi3", rope_parameters=expected, original_max_position_embeddings=64)
    reference = Reference(path, config=fixed)
    prompts = [p for p in prompts_for(128) if len(p) < max_model_len - 24]
    texts = [reference.greedy(p) for p in prompts]
    if max_model_len == 64:
        assert texts == [Reference(path).greedy(p) for p in prompts]  # as transformers has it up to the trained length
    with run(path, max_model_len=max_model_len) as llm:
        assert [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == texts


def test_dynamic_rope_within_the_models_own_positions(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    path = save_model(tiny_config("olmo2", max_position_embeddings=128, rope_parameters=rope), tmp_path)
    reference = Reference(path)
    with run(path) as llm:
        for prompt in prompts_for(128):
            assert difference(llm, reference, prompt[:128]) < TINY_TOLERANCE
    with pytest.raises(ConfigError, match="max_model_len=129 exceeds the 128 positions"):
        run(path, max_model_len=129)


def config_file(path: Path, kind: str, **options: Any) -> Path:
    config = tiny_config(kind, **options).to_dict()
    architecture = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, "Other")
    (path / "config.json").write_text(json.dumps({**config, "architectures": [architecture], "dtype": "float32"}))
    return path


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (
            "jamba",
            {"num_hidden_layers": 8, "num_experts": 2},
            "JambaForCausalLM .* layers of type linear_attention keep",
        ),
        ("mamba", {}, "MambaForCausalLM .* layers of type linear_attention keep"),
        ("rwkv", {"attention_hidden_size": 64, "context_length": 64}, "RwkvForCausalLM .* it keeps a recurrent state"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "Lfm2ForCausalLM .* layers of type conv keep"),
        ("bart", {"is_encoder_decoder": True}, "BartForCausalLM .* it belongs to an encoder"),
        ("t5", {}, "Other .* has no such causal LM for model_type 't5'"),
        ("bloom", {}, "BloomForCausalLM .* its attention is code of its own"),
        ("bloom", {"max_position_embeddings": None}, "BloomForCausalLM .* say vocab_size and max_position_embeddings"),
        ("gptj", {"n_embd": 64, "rotary_dim": 8}, "GPTJForCausalLM .* its attention is code of its own"),
        ("openai-gpt", {"n_embd": 64, "n_positions": 64}, "OpenAIGPTLMHeadModel .* 0 of its 3 layers call"),
        ("stablelm", {}, "StableLmForCausalLM .* do not pass keyword arguments on to their attention"),
        (
            "gemma2",
            MIXED,
            r"Gemma2ForCausalLM .* model\.layers\.0\.self_attn: its attention takes softcap=50\.0, which ours",
        ),
        ("gpt_oss", {**MIXED, "num_local_experts": 4}, r"GptOssForCausalLM .* its attention takes s_aux, which ours"),
        ("bert", {"is_decoder": False}, "BertLMHeadModel .* its attention mask is neither causal nor a sliding window"),
        ("diffllama", {}, "DiffLlamaForCausalLM .* it attends twice in one forward pass"),
        (
            "roberta",
            {"pad_token_id": 1, "is_decoder": True},
            "RobertaForCausalLM .* or on positions that the model counts for itself",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(tmp_path, kind, options, told):
    path = config_file(tmp_path, kind, **options)
    with pytest.raises(ModelNotSupported, match=rf"{told}.*; architectures with a file here: .*LlamaForCausalLM"):
        run(path, load_format="dummy")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sliding_window": 7}, r"its mask does not have its sliding_window=7"),
        ({"scaling": torch.tensor(0.5)}, "its scale is computed from the input"),
        ({"head_mask": torch.ones(1)}, "its attention takes head_mask, which ours does not have"),
        ({"dropout": 0.1}, r"its attention takes dropout=0\.1"),
        ({"position_bias": torch.ones(1)}, "its attention takes position_bias"),
        ({"is_causal": False}, "its attention is not causal"),
    ],
)
def test_an_option_that_attention_does_not_honour(monkeypatch, tmp_path, change, told):
    """None of it may be ignored."""
    hand_over = seam._hand_over
    monkeypatch.setattr(seam, "_hand_over", lambda *args, **options: hand_over(*args, **{**options, **change}))
    with pytest.raises(ModelNotSupported, match=told):
        run(config_file(tmp_path, "llama"), load_format="dummy", model_impl="transformers")


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (lambda b, h, q, k: k // 32 == q // 32, "neither causal nor a sliding window"),  # chunks
        (lambda b, h, q, k: (k <= q) & (k >= 0) | (k < 4), None),  # the same as causal here
        (lambda b, h, q, k: (k <= q) & ((k > q - 9) | (k < 4)), "neither causal nor a sliding window"),  # sinks
        (lambda b, h, q, k: k >= 0 * q, "neither causal nor a sliding window"),  # both ways
    ],
)
def test_a_mask_that_is_no_window(monkeypatch, tmp_path, mask, told):
    rows = seam._last_mask_rows
    monkeypatch.setattr(seam, "_last_mask_rows", lambda **given: rows(**{**given, "mask_function": mask}))
    path = config_file(tmp_path, "llama")
    if told is None:
        run(path, load_format="dummy", model_impl="transformers").close()
    else:
        with pytest.raises(ModelNotSupported, match=told):
            run(path, load_format="dummy", model_impl="transformers")


def test_neighbours_that_reach_a_token_past_attention(monkeypatch, olmo2):
    """A convolution or a norm over tokens is no attention, and would mix sequences of a batch."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

    forward = Olmo2MLP.forward
    monkeypatch.setattr(Olmo2MLP, "forward", lambda self, x: forward(self, x + x.roll(1, dims=1)))
    with pytest.raises(ModelNotSupported, match="depend on its neighbours not only through attention"):
        run(olmo2)


def broken(path: Path, to: Path, change: Any) -> Path:
    to.mkdir()
    (to / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_weights_that_do_not_fit_are_named(olmo2, tmp_path):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["stray"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(3, 64)

    with pytest.raises(WeightError) as caught:
        run(broken(olmo2, tmp_path / "model", change))
    message = str(caught.value)
    assert "the weights do not fit the model: 1 missing: model.norm.weight; 1 unexpected: stray; " in message
    assert "1 misshapen: lm_head.weight (is (3, 64), should be (128, 64))" in message


def test_damaged_and_absent_weights(olmo2, tmp_path):
    path = broken(olmo2, tmp_path / "model", lambda tensors: None)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightError, match="transformers cannot load it"):
        run(path)
    file.unlink()
    with pytest.raises(WeightError, match="transformers cannot load it"):
        run(path)


def test_load_format_says_which_file(olmo2, tmp_path):
    path = broken(olmo2, tmp_path / "model", lambda tensors: None)
    torch.save({k: -v for k, v in load_file(path / "model.safetensors").items()}, path / "pytorch_model.bin")
    texts = []
    for load_format in ("auto", "safetensors", "pt"):
        with run(path, load_format=load_format) as llm:
            texts.append(llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0]["token_ids"])
    assert texts[0] == texts[1] != texts[2]


def test_dummy_weights_are_seeded_and_leave_the_common_stream_alone(olmo2):
    def text(seed: int) -> list[int]:
        with run(olmo2, load_format="dummy", seed=seed) as llm:
            return llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0]["token_ids"]

    state = torch.get_rng_state()
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_gguf_files_are_not_for_transformers(tmp_path, smollm2_path):
    with pytest.raises(ConfigError, match=r"model_impl='transformers' reads Hugging Face directories, not .*\.gguf"):
        run(smollm2_path, model_impl="transformers")


def test_without_transformers_the_message_says_what_to_install(monkeypatch, olmo2):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelNotSupported, match=r"Olmo2ForCausalLM .* pip install 'nanovllm\[transformers\]'.*Llama"):
        run(olmo2)


def test_a_transformers_that_is_too_old(monkeypatch, olmo2):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ModelNotSupported, match=r"transformers 4\.57\.1 is too old: pip install --upgrade"):
        run(olmo2)


def test_memory_is_planned_before_loading(olmo2):
    config = EngineConfig(str(olmo2), device="cpu").resolve(checkpoint_dtype="float32", max_positions=512, cuda=False)
    read = TransformersConfig.from_hf(json.loads((olmo2 / "config.json").read_text()))
    found = footprint(TransformersForCausalLM, read, config)
    assert found.weights == sum(t.numel() * 4 for t in load_file(olmo2 / "model.safetensors").values())
    assert found.specs == (PagedKVSpec(2, 16, torch.float32),) * 3


def test_several_ranks_are_refused(olmo2):
    read = TransformersConfig.from_hf(json.loads((olmo2 / "config.json").read_text()))
    config = EngineConfig(str(olmo2), device="cpu").resolve(checkpoint_dtype="float32", max_positions=512, cuda=False)

    ctx = BuildContext(torch.device("cpu"), torch.float32, config.max_model_len, TPGroup(0, 2))
    with pytest.raises(ConfigError, match="set tensor_parallel_size=1"):
        TransformersForCausalLM(read, ctx)
