"""Every module imports, and `import nanovllm` brings in nothing that it does not need."""

import subprocess
import sys

EVERY_MODULE = """
import importlib, importlib.util, pkgutil, nanovllm
names = [m.name for m in pkgutil.walk_packages(nanovllm.__path__, "nanovllm.")]
if importlib.util.find_spec("triton") is None:  # it is for Linux alone
    names = [name for name in names if not name.startswith(("nanovllm.triton_kernels.", "nanovllm.ops.triton_ops"))]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_every_module_imports():
    assert int(run(EVERY_MODULE)) > 40


def test_nothing_of_an_extra_and_nothing_slow_is_imported():
    loaded = set(run("from nanovllm import LLM; import sys; print(*sys.modules)").split())
    unwanted = {"transformers", "triton", "flash_attn", "ray", "fastapi", "huggingface_hub", "gguf", "jinja2"}
    assert not loaded & unwanted
    assert "torch" in loaded


def test_torch_comes_with_llm_alone():
    loaded = set(run("import nanovllm, sys; nanovllm.SamplingParams(); print(*sys.modules)").split())
    assert not loaded & {"torch", "numpy", "nanovllm.llm"}
    assert run("import nanovllm; print(nanovllm.LLM.__name__)") == "LLM\n"
