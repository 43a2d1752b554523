"""docs/adding-a-model.md: the file that its Python blocks make runs OLMo 2 as transformers does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_parity import GREEDY, TINY_TOLERANCE, Reference, prompts_for
from test_transformers_model import difference, save_model, tiny_config

import nanovllm
from nanovllm import LLM
from nanovllm.cli.main import main
from nanovllm.models import registry
from nanovllm.models.registry import ENTRY_POINTS, Registry

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-model.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "olmo2.py"
    path.write_text("\n\n".join(blocks("python")))
    return path


@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": True, "attention_bias": True}])
def olmo2(request, tmp_path_factory):
    path = save_model(tiny_config("olmo2", **request.param), tmp_path_factory.mktemp("olmo2"))
    return path, Reference(path)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 13, "max_num_seqs": 5}, {"num_kvcache_blocks": 20, "kvcache_block_size": 8}],
)
def test_the_page_makes_a_model(plugin, olmo2, options):
    path, reference = olmo2
    prompts = prompts_for(128)
    expected = [reference.greedy(p) for p in prompts]
    with LLM(str(path), skip_tokenizer_init=True, model_plugin=str(plugin), **options) as llm:
        assert llm.engine._executor._runner.model.__class__.__module__ != "nanovllm.models.transformers_model"
        assert max(difference(llm, reference, p) for p in prompts) < TINY_TOLERANCE
        llm.reset_prefix_cache()
        for _ in range(2):  # the second time from cached prefixes
            assert [o["token_ids"] for o in llm.generate(prompts, GREEDY, use_tqdm=False)] == expected


def test_what_the_page_says_of_registering(plugin, olmo2, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", Registry(registry._MODELS))
    monkeypatch.syspath_prepend(plugin.parent)
    (text,) = blocks("text")
    (call,) = re.findall(r"nanovllm\.register_model\(.*?\)", text)
    from olmo2 import Olmo2ForCausalLM

    exec(call, {"nanovllm": nanovllm, "Olmo2ForCausalLM": Olmo2ForCausalLM})
    with LLM(str(olmo2[0]), skip_tokenizer_init=True) as llm:
        assert type(llm.engine._executor._runner.model) is Olmo2ForCausalLM
    assert f'[project.entry-points."{ENTRY_POINTS}"]' in PAGE


def test_the_command_that_proves_it(plugin, capsys):
    command = blocks("bash")[0].splitlines()[0].replace("olmo2.py", str(plugin)).split()  # needs no download
    assert command[:2] == ["nanovllm", "parity"]
    assert main(command[1:]) == 0
    assert "agrees with transformers" in capsys.readouterr().out
