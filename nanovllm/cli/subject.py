"""The model that `nanovllm parity` and `nanovllm verify` are asked about."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.cli.options import engine_options
from nanovllm.cli.reference import save_random_model
from nanovllm.errors import ConfigError
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.hub import resolve_model


@dataclass(frozen=True, slots=True)
class Subject:
    """options: the engine's, as far as they were given."""

    path: Path
    checkpoint: Checkpoint
    options: dict[str, Any]


@contextmanager
def subject(args: argparse.Namespace) -> Iterator[Subject]:
    """MODEL, or the tiny one of --random, whose files are there while the context lasts."""
    if (args.model is None) == (args.random is None):
        raise ConfigError(f"{args.command} takes one model: give MODEL or --random CONFIG")
    options = engine_options(args)
    revision = options.pop("revision", None)
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as folder:
        if args.random is not None:
            save_random_model(args.random, Path(folder))
        path = Path(folder) if args.random is not None else resolve_model(args.model, revision)
        yield Subject(path, open_checkpoint(path), options)
