"""Without the library, or with a wrong one, torch's kernels run and the log says what is lost."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from nanovllm.errors import ConfigError
from nanovllm.ops import base, library
from nanovllm.ops.library import NativeUnavailable, load_library

CPU = torch.device("cpu")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Where the library is looked for."""
    monkeypatch.setattr(library, "_PATH", tmp_path / "libnanovllm.so")
    library.library_or_reason.cache_clear()
    yield tmp_path / "libnanovllm.so"
    library.library_or_reason.cache_clear()


def test_without_the_library_torch_runs_and_one_line_says_so(elsewhere, caplog):
    with caplog.at_level(logging.WARNING):
        assert base.select_ops("auto", CPU, torch.bfloat16).name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "the native kernels were not built (a C++ compiler was missing at installation); "
        "torch's kernels run instead, at about half the speed"
    ]
    with pytest.raises(ConfigError, match="kernels='native': the native kernels were not built"):
        base.select_ops("native", CPU, torch.bfloat16)


def test_where_native_kernels_cannot_run_nothing_is_lost(elsewhere, caplog):
    assert base.select_ops("auto", CPU, torch.float16).name == "torch"
    assert base.select_ops("torch", CPU, torch.bfloat16).name == "torch"
    assert not caplog.records


def test_a_library_that_does_not_load_is_no_library(elsewhere):
    elsewhere.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="do not load"):
        load_library()


@pytest.mark.skipif(not library._PATH.exists(), reason="the native kernels are not built")
def test_a_library_of_another_version_is_not_called(monkeypatch):
    """An editable install after a pull: the sources are new, the library is old."""
    monkeypatch.setattr(library, "_ABI", -1)
    with pytest.raises(NativeUnavailable, match="another version; install again"):
        load_library()


def test_importing_the_package_loads_no_library():
    code = "import nanovllm, nanovllm.ops.base; print('libnanovllm' in open('/proc/self/maps').read())"
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
