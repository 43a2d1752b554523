"""The number of threads: asked for, by the environment, or what the machine gives this process."""

import os

import pytest
import torch

from nanovllm.engine import control_group
from nanovllm.engine import threads as module
from nanovllm.engine.threads import set_threads, usable_cores


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setattr(control_group, "_ROOT", tmp_path)
    monkeypatch.setattr(module.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    return tmp_path


def test_cores_that_the_process_may_use(group):
    assert usable_cores() == 6


@pytest.mark.parametrize(("text", "cores"), [("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1), ("?", 6)])
def test_quota(group, text, cores):
    (group / "cpu.max").write_text(text)
    assert usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 6), (200000, 2)])
def test_quota_of_the_first_version(group, quota, cores):
    (group / "cpu").mkdir()
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == cores


def test_who_decides(group, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads(7)
    set_threads(None)
    assert torch.get_num_threads() == 6
    threads(7)
    set_threads(None, ranks=2)
    assert torch.get_num_threads() == 3
    set_threads(None, ranks=9)
    assert torch.get_num_threads() == 1
    set_threads(2)
    assert torch.get_num_threads() == 2
    set_threads(None)  # fewer than there could be are somebody's choice
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads(7)
    set_threads(None)
    assert torch.get_num_threads() == 7
