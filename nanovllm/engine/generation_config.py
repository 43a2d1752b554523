"""generation_config.json: how a checkpoint's authors sample from it, and which tokens end its texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.errors import ConfigError, RequestError
from nanovllm.json_file import read_json
from nanovllm.sampling_params import SamplingParams
from nanovllm.weights.checkpoint import Checkpoint

_FILE = "generation_config.json"
# as vLLM: do_sample and everything else in the file say nothing about the defaults
_PARAMETERS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """sampling: arguments for SamplingParams where a request brings none. eos_ids: end a text."""

    sampling: dict[str, Any]
    eos_ids: list[int]


def generation_defaults(config: EngineConfig, checkpoint: Checkpoint) -> GenerationDefaults:
    """By the options generation_config and override_generation_config.

    "vllm" keeps the checkpoint's end-of-sequence tokens, as vLLM does; a folder's file stands for
    the checkpoint's. Raises ConfigError that names the file, or the option, with the wrong value.
    """
    values, source = checkpoint.generation_config, checkpoint.path / _FILE
    if config.generation_config not in ("auto", "vllm"):
        source = _file_in(config.generation_config)
        values = read_json(source)
    recommended = {} if config.generation_config == "vllm" else values
    sampling = _sampling(recommended, f"{source}", "correct it, or set generation_config='vllm'")
    override = config.override_generation_config or {}
    for key in override:
        if key not in _PARAMETERS:
            raise ConfigError(f"override_generation_config: {key!r} is not one of {', '.join(_PARAMETERS)}")
    sampling |= _sampling(override, "override_generation_config", "correct it")
    return GenerationDefaults(sampling, _token_ids(values.get("eos_token_id"), source))


def _file_in(folder: str) -> Path:
    file = Path(folder).expanduser() / _FILE
    if not file.is_file():
        raise ConfigError(
            f"generation_config={folder!r} must be 'auto', 'vllm', or a folder with a {_FILE}; {file} does not exist"
        )
    return file


def _sampling(values: dict[str, Any], source: str, remedy: str) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if key in _PARAMETERS and value is not None:
            found[_PARAMETERS[key]] = value
            try:
                SamplingParams(**{_PARAMETERS[key]: value})
            except RequestError as error:
                raise ConfigError(f"{source}: {key}={value!r}: {error}; {remedy}") from error
    return found


def _token_ids(value: Any, source: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{source}: eos_token_id must be a token id or a list of them, got {value!r}; correct it")
    return ids
