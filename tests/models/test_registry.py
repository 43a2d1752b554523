"""Which class runs an architecture: built in, installed, registered or from a file."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm
from nanovllm import LLM, ConfigError, ModelNotSupported
from nanovllm.models import registry
from nanovllm.models.base import CausalLM
from nanovllm.models.llama import LlamaConfig, LlamaForCausalLM
from nanovllm.models.registry import Registry, model_class, register_model, supported_architectures

BUILT_IN = {"LlamaForCausalLM": "nanovllm.models.llama:LlamaForCausalLM"}
PLUGIN = """
from nanovllm.models.llama import LlamaForCausalLM

class {name}(LlamaForCausalLM):
    pass
"""


@pytest.fixture
def fresh(monkeypatch):
    """A registry that other tests do not see."""
    monkeypatch.setattr(registry, "_REGISTRY", Registry(registry._MODELS))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install("name", {architecture: place}) -> an installed package with these entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{architecture} = {place}" for architecture, place in points.items()]
        (info / "entry_points.txt").write_text("[nanovllm.models]\n" + "\n".join(lines) + "\n")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)

    return make


class Mine(LlamaForCausalLM):
    pass


class NoConfig(CausalLM):
    pass


def test_a_built_in_file_is_imported_when_it_is_asked_for():
    assert model_class(["LlamaForCausalLM"]) is LlamaForCausalLM
    assert model_class(["Unheard", "LlamaForCausalLM"], model_impl="nanovllm") is LlamaForCausalLM
    assert supported_architectures()["LlamaForCausalLM"] == "nanovllm.models.llama"


def test_listing_imports_no_torch():
    code = "import sys; from nanovllm.models.registry import supported_architectures as s; s(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "nanovllm.models.registry" in loaded and not {"torch", "transformers"} & set(loaded)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("model", [Mine, f"{__name__}:Mine"])
def test_a_registered_class_goes_before_the_built_in_one(model, caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    nanovllm.register_model("MineForCausalLM", model)
    assert model_class(["MineForCausalLM"]) is Mine and not caplog.records
    register_model("LlamaForCausalLM", model)
    assert model_class(["LlamaForCausalLM"]) is Mine
    assert f"{__name__}:Mine runs LlamaForCausalLM, not nanovllm's own file" in caplog.text
    assert supported_architectures()["MineForCausalLM"] == __name__
    with pytest.raises(ModelNotSupported, match="MineForCausalLM"):  # it is listed
        model_class(["Unheard"], model_impl="nanovllm")


@pytest.mark.usefixtures("fresh")
def test_the_same_class_may_be_registered_again_and_no_other():
    register_model("X", Mine)
    register_model("X", Mine)
    register_model("X", f"{__name__}:Mine")
    with pytest.raises(ConfigError, match=r"'X'.*test_registry:Mine has that name already, not .*LlamaForCausalLM"):
        register_model("X", LlamaForCausalLM)
    assert model_class(["X"]) is Mine


@pytest.mark.parametrize(
    ("architecture", "model", "told"),
    [
        ("X", LlamaConfig, "no subclass of nanovllm.models.base.CausalLM"),
        ("X", None, "no subclass of"),
        ("X", NoConfig, "NoConfig lacks a config_class"),
        ("X", "nanovllm.models.llama", "not of the form 'module:Class'"),
        ("X", "a/b.py:C", "not of the form"),
        ("Llama For", Mine, "no architecture as config.json names them"),
        (Mine, Mine, "no architecture"),
    ],
)
def test_wrong_registrations_are_refused_at_once(architecture, model, told):
    with pytest.raises(ConfigError, match=told):
        Registry(BUILT_IN).register(architecture, model)


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        ("no.such.module:C", ModelNotSupported, r"no\.such\.module:C cannot be imported: ModuleNotFoundError"),
        ("nanovllm.models.llama:C", ModelNotSupported, "AttributeError"),
        ("nanovllm.models.llama:LlamaConfig", ConfigError, "no subclass of"),
    ],
)
def test_a_wrong_place_is_told_when_it_is_needed(place, error, told):
    models = Registry(BUILT_IN)
    models.register("X", place)
    assert models.find(["LlamaForCausalLM"]) is LlamaForCausalLM
    with pytest.raises(error, match=rf"register_model\('X'\).*{told}"):
        models.find(["X"])


def test_an_installed_package_brings_models(install, caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    points = {"OursForCausalLM": "ours:Ours", "LlamaForCausalLM": "ours:Ours", "BrokenForCausalLM": "broken:B"}
    install("nice", points, ours=PLUGIN.format(name="Ours"), broken="1 / 0")
    models = Registry(BUILT_IN)
    assert models.places() == {**BUILT_IN, **points}
    assert "ours" not in sys.modules
    found = models.find(["OursForCausalLM"])
    assert found is not None and found.__name__ == "Ours" and not caplog.records
    assert models.find(["LlamaForCausalLM"]) is found
    assert "ours:Ours runs LlamaForCausalLM, not nanovllm's own file" in caplog.text
    with pytest.raises(ModelNotSupported, match=r"package nice: broken:B cannot be imported: ZeroDivisionError"):
        models.find(["BrokenForCausalLM"])
    models.register("LlamaForCausalLM", Mine)
    assert models.find(["LlamaForCausalLM"]) is Mine


def test_two_packages_for_one_architecture(install):
    install("one", {"X": "one:C"})
    install("two", {"X": "two:C", "Y": "two:C"})
    with pytest.raises(ModelNotSupported, match=r"run X: one:C \(one\), two:C \(two\); uninstall all but one"):
        Registry(BUILT_IN).find(["X"])


@pytest.fixture
def plugin(tmp_path):
    def write(source: str) -> str:
        path = tmp_path / "my model.py"
        path.write_text(source)
        return str(path)

    return write


def test_a_file_runs_a_model_in_its_own_llm_alone(plugin, tiny_model, caplog):
    caplog.set_level(logging.INFO, "nanovllm")
    path = plugin(
        "from nanovllm.models import llama\n\nclass LlamaForCausalLM(llama.LlamaForCausalLM):\n"
        "    def compute_logits(self, hidden):\n        return -super().compute_logits(hidden)\n"
    )
    model = str(tiny_model("llama"))
    with LLM(model, skip_tokenizer_init=True, model_plugin=path) as turned, LLM(model, skip_tokenizer_init=True) as llm:
        assert "runs LlamaForCausalLM, not nanovllm's own file" in caplog.text
        texts = [each.generate([5, 6, 7], use_tqdm=False)[0]["token_ids"] for each in (turned, llm)]
    assert texts[0] != texts[1]


def test_an_edited_file_is_read_anew(plugin):
    path = plugin(PLUGIN.format(name="X"))
    first = model_class(["X"], model_plugin=path)
    assert first.__doc__ is None
    assert plugin(PLUGIN.format(name="X").replace("pass", "'''new'''")) == path
    assert model_class(["X"], model_plugin=path).__doc__ == "new"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = ", "cannot be imported: SyntaxError"),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        (PLUGIN.format(name="Y"), "no subclass of CausalLM named X or Z, as config.json asks; it defines Y"),
        ("from nanovllm.models.llama import LlamaForCausalLM as X", "it defines none"),
        ("from nanovllm.models.base import CausalLM\n\nclass X(CausalLM):\n    pass", "X lacks a config_class"),
    ],
)
def test_a_file_that_does_not_fit(plugin, source, told):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=rf"model_plugin='.*my model\.py'.*{told}"):
        model_class(["X", "Z"], model_plugin=plugin(source))
    if "cannot be imported" in told:
        assert set(sys.modules) == before


def test_no_such_file(tmp_path):
    for path in (tmp_path / "none.py", tmp_path, Path(__file__).parents[2] / "README.md"):
        with pytest.raises(ConfigError, match="is no Python file"):
            model_class(["X"], model_plugin=str(path))


def test_a_file_and_transformers_modules_exclude_each_other():
    with pytest.raises(ConfigError, match="set model_plugin or model_impl='transformers', not both"):
        LLM("any", model_plugin="x.py", model_impl="transformers")
    with pytest.raises(ConfigError, match="model_impl='vllm' is not one of auto, nanovllm, transformers"):
        LLM("any", model_impl="vllm")
