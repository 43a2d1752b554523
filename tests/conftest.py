"""Fixtures that several folders share: small random models, and the real SmolLM2."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes run tests: threads would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from interpreter import patch_once_a_kernel
from kernels import at_level
from tiny_models import make_chat_model, make_tiny_model

from nanovllm.ops.library import LEVELS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU

ALIAS = "smollm2-135m"
LONGEST = (
    *("test_compile_attention.py", "test_tensor_parallel.py", "test_executor.py", "test_compile.py"),
    *("test_executor_ray.py", "test_parity.py", "test_run_batch_ray.py", "test_exactness.py", "test_sampler.py"),
    *("test_group.py", "test_native_attention.py", "test_bench.py", "test_batch_invariant.py"),
    *("test_triton_attention.py", "test_executor_torchrun.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process: the files that take longest go first, so that all processes end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Of Triton, if any test that was collected imports it."""
    with pytest.MonkeyPatch.context() as patch:
        if "triton" in sys.modules and "TRITON_INTERPRET" in os.environ:
            patch_once_a_kernel(patch)
        yield


@pytest.fixture
def interruptible_children():
    """A shell starts background jobs with Ctrl-C ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest):
    """Every instruction set that this processor has kernels for, one after the other."""
    with at_level(request.param) as supported:
        if not supported:
            pytest.skip("not on this processor")
        yield request.param


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """tiny_model("llama") -> the directory of a saved random model."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, with tokenizer and chat template."""
    return make_chat_model("llama", tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, fetched on first use."""
    from nanovllm.weights.hub import resolve_model

    return resolve_model(ALIAS)
