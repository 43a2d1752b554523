"""What is asked of every engine: a job, then presets, and the token ids that they stand for."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

Sequences = list[tuple[list[int], int]]
"""(prompt token ids, output length) of each sequence."""

_WORTH_SHARING = 32  # tokens


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine is loaded for.

    paths: {"own": for nanovllm, "hf": a Hugging Face directory, "gguf": a file}, as far as there are such.
    random: no weights on disk, whatever the engine likes instead. num_seqs, longest: of any preset.
    options: of nanovllm's engine.
    """

    paths: dict[str, str]
    dtype: str
    random: bool
    num_seqs: int
    longest: int
    options: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """An engine does not take its job, and says why."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Ranges of lengths in tokens, both ends included; shared: of a beginning that all prompts have, on top. apart:
    one sequence after the other."""

    num_seqs: int
    input: tuple[int, int]
    output: tuple[int, int]
    shared: int = 0
    apart: bool = False

    @property
    def longest(self) -> int:
        return self.shared + self.input[1] + self.output[1]

    def __str__(self) -> str:
        shared = f"{self.shared} shared + " if self.shared else ""
        apart = ", one after the other" if self.apart else ""
        return f"{self.num_seqs} x ({shared}{_range(self.input)} in, {_range(self.output)} out){apart}"

    def batches(self, sequences: Sequences) -> list[Sequences]:
        """What an engine is given at once."""
        return [[one] for one in sequences] if self.apart else [sequences]


PRESETS = {
    "single": Preset(1, (64, 64), (128, 128)),
    "first": Preset(64, (32, 32), (1, 1), apart=True),
    "prefill": Preset(1, (1024, 1024), (1, 1)),
    "batch8": Preset(8, (64, 64), (64, 64)),
    "batch32": Preset(32, (64, 64), (64, 64)),
    "batch64": Preset(64, (128, 128), (128, 128)),
    "batch256": Preset(256, (128, 128), (128, 128)),
    "mixed": Preset(64, (100, 400), (50, 200)),
    "prefix": Preset(24, (32, 32), (32, 32), shared=512),
    "long": Preset(1, (4096, 4096), (64, 64)),
    # for GPUs; the first is nano-vllm's own
    "nano": Preset(256, (100, 1024), (100, 1024)),
    "prompts16": Preset(16, (2048, 2048), (1, 1)),
    "batch128": Preset(128, (128, 128), (512, 512)),
}


def make_sequences(preset: Preset, vocab_size: int, seed: int) -> Sequences:
    rng = random.Random(seed)
    lengths = [(rng.randint(*preset.input), rng.randint(*preset.output)) for _ in range(preset.num_seqs)]
    shared = [rng.randrange(vocab_size) for _ in range(preset.shared)]
    return [(shared + [rng.randrange(vocab_size) for _ in range(n)], count) for n, count in lengths]


def shared_beginning(sequences: Sequences) -> list[int]:
    """Tokens that all of several prompts begin with; none where it is hardly worth it."""
    prompts = [p[:-1] for p, _ in sequences]
    columns = zip(*prompts, strict=False)
    count = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return prompts[0][:count] if len(prompts) > 1 and count >= _WORTH_SHARING else []


def _range(ends: tuple[int, int]) -> str:
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"
