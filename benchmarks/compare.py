"""Engines in turn on the same token ids: preset after preset, round after round."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.engines import READS
from benchmarks.probe import probe_text
from benchmarks.report import finish, print_table, speed
from benchmarks.roof import Work
from benchmarks.worker import EngineEnded, Worker
from benchmarks.workload import Job, Preset, make_sequences

_TORCH = {"kernels": "torch", "attention_backend": "cpu"}


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine under a label; options: of nanovllm's."""

    label: str
    engine: str
    options: dict[str, Any]


def contenders(engines: Sequence[str], changes: Sequence[str]) -> list[Contender]:
    """changes: OPTION=VALUE or several, joined by commas; each for another nanovllm."""
    found = []
    for name in engines:
        torchs = name == "nanovllm-torch"
        found.append(Contender(name, "nanovllm" if torchs else name, _TORCH if torchs else {}))
    for change in changes:
        pairs = [part.partition("=") for part in change.split(",")]
        found.append(Contender(change, "nanovllm", {option: _value(value) for option, _, value in pairs}))
    return found


def run(args: argparse.Namespace, presets: dict[str, Preset]) -> None:
    found: dict[str, Any] = {}
    wanted = contenders(args.engine, args.ab)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = model_of(args, wanted, Path(scratch))
        work = Work.of(model.config, args.dtype)
        with _workers(args, wanted, model, presets) as (probe, workers):
            for name, preset in presets.items():
                rounds = [_round(args, model, preset, i, probe, workers) for i in range(args.rounds + 1)]
                results = _medians(preset, rounds[1:], workers, work)  # the first warmed up
                print_table(f"{name}: {preset}, {model.name} in {args.dtype}, median of {args.rounds}", results)
                probes = [one.probe for one in rounds[1:]]
                found[name] = {"shape": str(preset), "probes": probes, "results": results}
    finish(args, model=model.name, dtype=args.dtype, seed=args.seed, rounds=args.rounds, presets=found)


@dataclass(frozen=True, slots=True)
class Round:
    """probe: of the machine, before it. answers: by label, of those that are still there: seconds, and what they say
    of themselves."""

    probe: dict[str, float]
    sequences: list[tuple[list[int], int]]
    answers: dict[str, dict[str, Any]]


def model_of(args: argparse.Namespace, wanted: Sequence[Contender], folder: Path) -> models.Model:
    if args.shape:
        return (models.quantized_shape if args.load_format == "gguf" else models.shape)(args.shape, folder)
    export = any(READS[c.engine] == "hf" for c in wanted)
    return models.find(args.model, args.dtype, folder, export=export, random=args.load_format == "dummy")


@contextmanager
def _workers(
    args: argparse.Namespace, wanted: Sequence[Contender], model: models.Model, presets: dict[str, Preset]
) -> Iterator[tuple[Worker, dict[str, Worker]]]:
    """The probe, and the engines by label; who does not load is left out."""
    num_seqs, longest = max(p.num_seqs for p in presets.values()), max(p.longest for p in presets.values())
    pythons = dict(p.split("=", 1) for p in args.python)
    ours = sum(c.engine == "nanovllm" for c in wanted)
    # engines that take turns keep their part of a GPU's memory meanwhile
    shared = {"gpu_memory_utilization": 0.8 / ours} if ours > 1 and torch.cuda.is_available() else {}
    with ExitStack() as stack:
        workers = {}
        plain = Job(model.paths, args.dtype, model.random, num_seqs, longest)
        probe = Worker("probe", pythons.get("probe", sys.executable), plain)
        stack.callback(probe.close)
        for c in wanted:
            if READS[c.engine] not in model.paths:
                print(f"{c.label}: does not read {model.name}; left out")
                continue
            job = Job(model.paths, args.dtype, model.random, num_seqs, longest, shared | c.options)
            try:
                workers[c.label] = Worker(c.engine, pythons.get(c.engine, sys.executable), job)
            except EngineEnded as error:
                print(f"{c.label}: left out: {error}")
                continue
            stack.callback(workers[c.label].close)
        if not workers:
            raise SystemExit("no engine is left")
        yield probe, workers


def _round(
    args: argparse.Namespace,
    model: models.Model,
    preset: Preset,
    number: int,
    probe: Worker,
    workers: dict[str, Worker],
) -> Round:
    sequences = make_sequences(preset, model.config["vocab_size"], args.seed + number)
    machine = {key: value for key, value in probe.ask([[]]).items() if key != "seconds"}
    answers = {}
    for label, worker in list(workers.items()):
        try:
            answers[label] = worker.ask(preset.batches(sequences))
        except EngineEnded as error:
            print(f"{label}: left out from here on: {error}")
            del workers[label]
    if number:
        speeds = ", ".join(f"{label} {speed(preset, sequences, a['seconds']):.0f}" for label, a in answers.items())
        print(f"round {number}: {probe_text(machine)}: {speeds} tok/s", flush=True)
    return Round(machine, sequences, answers)


def _medians(
    preset: Preset, rounds: Sequence[Round], workers: dict[str, Worker], work: Work | None
) -> dict[str, dict[str, Any]]:
    """By label; of_roof: for nanovllm, which says what its weights are."""
    results = {}
    for label, worker in workers.items():
        timed = [(r, r.answers[label]["seconds"]) for r in rounds]
        median = {
            "seconds": statistics.median(s for _, s in timed),
            "input": statistics.median(sum(len(p) for p, _ in r.sequences) / s for r, s in timed),
            "output": statistics.median(sum(n for _, n in r.sequences) / s for r, s in timed),
            "load": worker.load,
        }
        if work is not None and worker.engine == "nanovllm":
            mine = replace(work, weights=rounds[0].answers[label]["weights"])
            shares = [
                sum(mine.seconds(batch, preset.shared, r.probe) for batch in preset.batches(r.sequences)) / s
                for r, s in timed
            ]
            median["of_roof"] = statistics.median(shares)
        results[label] = median
    return results


def _value(text: str) -> Any:
    """As JSON if it is: 13, true; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
