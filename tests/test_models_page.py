"""docs/models.md says what there is; `python docs/make_models.py` writes it."""

import runpy
from pathlib import Path

from tiny_models import TINY

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
WRITER = runpy.run_path(str(DOCS / "make_models.py"))


def test_architectures_and_memory_are_up_to_date():
    assert WRITER["architectures"]() in PAGE
    assert WRITER["memory_rows"]() in PAGE


def test_every_variant_has_its_rows_and_none_failed():
    rows = [line.split(" | ") for line in PAGE.splitlines()]
    for variant, config in TINY.items():
        found = [row for row in rows if row[:2] == [f"| {variant}", config["architectures"][0]]]
        lengths = [2 + len(WRITER[columns]) for columns in ("FEATURES", "FILES", "QUANTISED")]
        parity = found[0]
        assert [len(row) for row in found] == lengths
        assert all("✓" in cell for cell in parity[2:]), variant
    assert "✗" not in PAGE
