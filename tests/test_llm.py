"""The offline API, on a tiny model with a byte tokenizer and on SmolLM2."""

import json

import pytest
import torch
from helpers import byte_tokenizer
from tiny_models import make_tiny_model

import nanovllm
from nanovllm import LLM, ConfigError, EngineClosed, ModelNotFound, ModelNotSupported, RequestError, SamplingParams

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot: {% endif %}"
)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama over bytes, with tokenizer and chat template."""
    path = make_tiny_model(
        "llama", tmp_path_factory.mktemp("bytes"), vocab_size=258, bos_token_id=256, eos_token_id=257
    )
    byte_tokenizer().backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model)) as llm:
        yield llm


def test_prompts_of_every_kind_in_order(llm):
    prompts = ["hello", list(b"hello"), {"prompt": "hello"}, {"prompt_token_ids": list(b"hello"), "cache_salt": "x"}]
    outputs = llm.generate(prompts, SHORT, use_tqdm=False)
    assert len({tuple(o["token_ids"]) for o in outputs}) == 1
    assert [o.prompt for o in outputs] == ["hello", None, "hello", None]
    assert all(o.prompt_token_ids == list(b"hello") and o.finished for o in outputs)


def test_one_prompt_gives_a_list_of_one(llm):
    for prompt in ("hello", list(b"hello"), {"prompt": "hello"}):
        assert len(llm.generate(prompt, SHORT, use_tqdm=False)) == 1
    assert llm.generate([], SHORT, use_tqdm=False) == []


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["a" * n for n in (30, 1, 20, 5)]
    lengths = [1, 9, 4, 2]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o["token_ids"]) for o in outputs] == lengths


def test_output_is_an_object_and_nano_vllms_dict(llm):
    output = llm.generate("hi", SHORT, use_tqdm=False)[0]
    assert output["text"] == output.outputs[0].text
    assert output["token_ids"] == output.outputs[0].token_ids
    with pytest.raises(KeyError, match="'text' or 'token_ids'"):
        output["texts"]


def test_default_params_are_vllms(llm):
    output = llm.generate("hi", use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 16 or output.finish_reason == "stop"


def test_numbers_of_params_and_priorities_must_match(llm):
    with pytest.raises(RequestError, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [SHORT], use_tqdm=False)
    with pytest.raises(RequestError, match="scheduling_policy='priority'"):
        llm.generate(["a"], SHORT, use_tqdm=False, priority=[1])


def test_one_bad_prompt_runs_nothing(llm):
    before = llm.engine.stats.steps
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["good", ""], SHORT, use_tqdm=False)
    assert llm.engine.stats.steps == before
    assert not llm.engine.has_unfinished


def test_chat_renders_the_template_once(llm):
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, SHORT, use_tqdm=False)[0]
    assert output.prompt == "<s>user: hi\nbot: "
    assert output.prompt_token_ids == [256, *b"user: hi\nbot: "]
    both = llm.chat([messages, messages], SHORT, use_tqdm=False)
    assert [o["token_ids"] for o in both] == [output["token_ids"]] * 2
    assert llm.chat(messages, SHORT, use_tqdm=False, add_generation_prompt=False)[0].prompt == "<s>user: hi\n"
    custom = llm.chat(messages, SHORT, False, chat_template="{{ x }}", chat_template_kwargs={"x": "abc"})
    assert custom[0].prompt == "abc"


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [[]], ["hi"]])
def test_chat_refuses_what_is_no_conversation(llm, messages):
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages, SHORT, use_tqdm=False)


def test_stream_gives_the_text_in_pieces(llm):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True)
    expected = llm.generate("hello", params, use_tqdm=False)[0]

    def consume():
        output = yield from llm.stream("hello", params)
        assert output.finished
        assert output["token_ids"] == expected["token_ids"]

    pieces = list(consume())
    assert "".join(pieces) == expected["text"]
    assert len(pieces) > 5


def test_other_calls_may_run_between_pieces_of_a_stream(llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = llm.generate("hello", params, use_tqdm=False)[0]["text"]
    stream = llm.stream("hello", params)
    text = next(stream)
    assert len(llm.generate(["one", "two"], SHORT, use_tqdm=False)) == 2
    assert text + "".join(stream) == expected


def test_streams_that_are_read_in_turn_run_together(llm):
    """Each was queued when its first piece was asked for, so that every prompt took a step of its own.
    One that ended while it showed a piece lost what had come meanwhile."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = ["one", "two", "three", "four"]
    expected = [output["text"] for output in llm.generate(prompts, params, use_tqdm=False)]
    before = llm.engine.stats.steps
    streams = dict(enumerate(llm.stream(prompt, params) for prompt in prompts))
    texts = [""] * len(prompts)
    while streams:
        for i in list(streams):
            piece = next(streams[i], None)
            texts[i] += piece or ""
            if piece is None:
                del streams[i]
    assert texts == expected
    assert llm.engine.stats.steps - before == 10


def test_dropping_a_stream_that_was_never_read_aborts_it(llm):
    stream = llm.stream("hello", SamplingParams(max_tokens=200, ignore_eos=True))
    assert llm.engine.has_unfinished
    del stream
    assert not llm.engine.has_unfinished


def test_leaving_a_stream_aborts_it(llm):
    stream = llm.stream("hello", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    assert llm.engine.has_unfinished
    stream.close()
    assert not llm.engine.has_unfinished


def test_stream_refuses_what_it_cannot_show(llm):
    for params in (SamplingParams(n=2), SamplingParams(detokenize=False)):
        with pytest.raises(RequestError, match="stream"):
            llm.stream("x", params)


def test_interrupting_generate_leaves_the_engine_usable(llm, monkeypatch):
    expected = llm.generate("hello", SHORT, use_tqdm=False)[0]["token_ids"]
    real, calls = llm.engine._executor.submit, []

    def interrupted(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(plan)

    monkeypatch.setattr(llm.engine._executor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello", "world"], SHORT, use_tqdm=False)
    assert not llm.engine.has_unfinished
    assert llm.generate("hello", SHORT, use_tqdm=False)[0]["token_ids"] == expected
    cache = llm.engine.scheduler.cache.blocks
    assert cache.num_free == cache.num_usable


def test_progress_bar_shows_requests_and_both_rates(llm, capsys):
    llm.generate(["a", "b", "c"], SHORT)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "prefill" in shown
    assert "decode" in shown


def test_two_engines_in_one_process(model, llm):
    expected = llm.generate("hello", SHORT, use_tqdm=False)[0]["token_ids"]
    with LLM(str(model), dtype="bfloat16", seed=1) as other:
        first, second = llm.stream("hello", SHORT), other.stream("hello", SHORT)
        assert next(first)
        list(second)
        list(first)
    assert llm.generate("hello", SHORT, use_tqdm=False)[0]["token_ids"] == expected


def test_closed(model):
    with LLM(str(model)) as llm:
        pass
    llm.close()
    with pytest.raises(EngineClosed):
        llm.generate("x", use_tqdm=False)


def test_priority_policy(model):
    with LLM(str(model), scheduling_policy="priority", max_num_seqs=1) as llm:
        outputs = llm.generate(["a", "b"], SHORT, use_tqdm=False, priority=[5, 1])
    assert outputs[1].metrics.finished_time < outputs[0].metrics.finished_time


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM("smollm2-135m", max_num_seq=3)


def test_cache_memory_bounds_the_model_len(model):
    with LLM(str(model), num_kvcache_blocks=4) as llm:
        assert llm.engine.config.max_model_len == 64
        with pytest.raises(RequestError, match="max_model_len=64"):
            llm.generate([[1] * 64], SHORT, use_tqdm=False)
    with pytest.raises(ConfigError, match="holds 64 tokens"):
        LLM(str(model), num_kvcache_blocks=4, max_model_len=100)
    with pytest.raises(ConfigError, match="hold no page"):
        LLM(str(model), kvcache_memory=1000)
    with pytest.raises(ConfigError, match="bytes that are free"):
        LLM(str(model), kvcache_memory="90000GiB")
    with pytest.raises(ConfigError, match="are free: lower it"):
        LLM(str(model), num_kvcache_blocks=10**12)


def test_cache_memory_is_what_was_asked_for(model):
    with LLM(str(model), kvcache_memory="1MiB", max_num_seqs=2) as llm:
        plan = llm.engine._executor.capacity
        page = 3 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head_dim, fp32
        assert plan.num_blocks == min(2**20 // page, 2 * 32 + 1)
        assert plan.num_bytes == plan.num_blocks * page


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ModelNotSupported, "MambaForCausalLM .*LlamaForCausalLM"),
        ({"architectures": None}, ModelNotSupported, "none named"),
        ({"hidden_act": "gelu"}, ModelNotSupported, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, ModelNotSupported, "'ntk'"),
    ],
)
def test_unsupported_models(model, tmp_path, change, error, message):
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        LLM(str(tmp_path))


def test_missing_model():
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        LLM("./no/such/model.gguf")


def test_tokenizer_from_elsewhere_and_none(model, tiny_model):
    with LLM(str(tiny_model("qwen3")), skip_tokenizer_init=True) as llm:
        assert llm.generate([[5, 6]], SHORT, use_tqdm=False)[0]["text"] == ""
        for call in (lambda: llm.get_tokenizer(), lambda: llm.stream([1]), lambda: llm.generate("x")):
            with pytest.raises(RequestError, match="no tokenizer"):
                call()
    with LLM(str(model), tokenizer=str(model)) as llm:
        assert llm.generate("x", SHORT, use_tqdm=False)[0].prompt_token_ids == [120]


def test_dummy_weights_need_only_a_config(model, tmp_path):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    options = {"load_format": "dummy", "skip_tokenizer_init": True}
    outputs = []
    for seed in (1, 1, 2):
        with LLM(str(tmp_path), seed=seed, **options) as llm:
            outputs.append(llm.generate([[1, 2, 3]], SHORT, use_tqdm=False)[0]["token_ids"])
    assert outputs[0] == outputs[1] != outputs[2]


def test_bfloat16_and_float16_run(model):
    for dtype in ("bfloat16", "float16"):
        with LLM(str(model), dtype=dtype) as llm:
            assert len(llm.generate("hello", SHORT, use_tqdm=False)[0]["token_ids"]) == 6


def test_global_torch_settings_are_untouched(model):
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    with LLM(str(model)) as llm:
        llm.generate("hello", SHORT, use_tqdm=False)
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_inference_mode_enabled()) == before


def test_smollm2_answers_sensibly():
    """The main job of a newcomer: a real chat model, by its alias, in bfloat16."""
    with LLM("smollm2-135m") as llm:
        assert llm.engine.config.dtype == "bfloat16"
        question = [{"role": "user", "content": "What is the capital of France?"}]
        output = llm.chat(question, SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)[0].outputs[0]
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
    assert nanovllm.__version__
