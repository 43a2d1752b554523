"""transformers as the reference of `nanovllm parity` and as the maker of tiny random models; the only place of
the command line that imports it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from nanovllm.cli.shrink import shrink_config
from nanovllm.errors import ConfigError, ModelNotSupported

_NOISE = 0.05
_TINY = 5_000_000  # parameters


class Reference:
    """A model of Hugging Face's own code, in eval mode."""

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        """path: a directory or a `.gguf` file."""
        transformers = _transformers()
        place: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.is_file():
            place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
        except (ValueError, ImportError, KeyError, OSError) as error:
            raise ModelNotSupported(f"transformers cannot load {path}: {error}") from error
        self.model: Any = model.to(device).eval()
        self.model.generation_config = transformers.GenerationConfig()  # no penalties, no end of text
        self._device = device

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """fp32 [T, vocabulary] on the CPU."""
        return self.model(torch.tensor([token_ids], device=self._device)).logits[0].float().cpu()

    @torch.inference_mode()
    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        """The `count` tokens that follow, whatever ends texts."""
        ids = torch.tensor([token_ids], device=self._device)
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        try:
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ModelNotSupported(f"transformers does not generate with this model: {error}") from error
        return found[0, len(token_ids) :].tolist()


def save_random_model(source: str, folder: Path) -> None:
    """Save a tiny random model of a family into `folder`.

    source: a config.json, a directory that holds one, or a model type such as "llama".
    """
    transformers = _transformers()
    config = shrink_config(_config_of(source, transformers))
    model_type = config.pop("model_type", None)
    torch.manual_seed(0)
    try:
        tiny = transformers.AutoConfig.for_model(model_type, **config)
        model = transformers.AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    except Exception as error:  # whatever this family's code makes of sizes that it was not written for
        raise ModelNotSupported(f"transformers builds no tiny model of type {model_type!r}: {error}") from error
    size = sum(p.numel() for p in model.parameters())
    if size > _TINY:
        raise ModelNotSupported(f"{source} cannot be shrunk: {size:,} parameters are left")
    for parameter in model.parameters():  # norms and biases too: ones and zeros would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * _NOISE)
    model.save_pretrained(folder)


def _config_of(source: str, transformers: Any) -> dict[str, Any]:
    path = Path(source).expanduser()
    try:
        if path.exists():
            return transformers.AutoConfig.from_pretrained(path).to_dict()
        config = transformers.AutoConfig.for_model(source).to_dict()
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"--random {source}: neither a config.json, nor a directory, nor a model type of transformers"
        ) from error
    kinds = config.get("layer_types")
    if kinds and set(kinds) <= {"mamba", "linear_attention"}:
        config["layer_types"] = ["full_attention", *kinds[1:]]  # a hybrid's default has none, and does not generate
    return config


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"this needs transformers, which is not here ({error}): pip install 'nanovllm[transformers]'"
        ) from error
    if not logging.getLogger("nanovllm").isEnabledFor(logging.INFO):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    return transformers
