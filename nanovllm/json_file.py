"""The small JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelNotFound


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; ModelNotFound if it cannot be read or is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelNotFound(f"cannot read {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelNotFound(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ModelNotFound(f"{file} is not a JSON object; fetch it again")
    return values
