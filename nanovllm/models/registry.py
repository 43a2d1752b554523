"""Which class runs which architecture: built in, installed, registered, or from a file.

docs/adding-a-model.md shows how to write such a class.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError, ModelNotSupported

if TYPE_CHECKING:  # base brings torch, and `nanovllm models` only lists
    from importlib.metadata import EntryPoint

    from nanovllm.models.base import CausalLM

logger = logging.getLogger(__name__)

ENTRY_POINTS = "nanovllm.models"
"""Group of the entry points of installed packages: architecture = "module:Class"."""

_MODELS = {
    "FalconForCausalLM": "nanovllm.models.falcon:FalconForCausalLM",
    "GPT2LMHeadModel": "nanovllm.models.gpt2:GPT2LMHeadModel",
    "GPTNeoXForCausalLM": "nanovllm.models.gpt_neox:GPTNeoXForCausalLM",
    "Gemma3ForCausalLM": "nanovllm.models.gemma3:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": "nanovllm.models.gemma3:Gemma3ForCausalLM",  # its language model
    "GraniteForCausalLM": "nanovllm.models.granite:GraniteForCausalLM",
    "GraniteMoeForCausalLM": "nanovllm.models.granitemoe:GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM": "nanovllm.models.granite_hybrid:GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM": "nanovllm.models.granitemoe:GraniteMoeForCausalLM",
    "LlamaForCausalLM": "nanovllm.models.llama:LlamaForCausalLM",
    "MinistralForCausalLM": "nanovllm.models.mistral:MistralForCausalLM",
    "MistralForCausalLM": "nanovllm.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "nanovllm.models.mixtral:MixtralForCausalLM",
    "MPTForCausalLM": "nanovllm.models.mpt:MptForCausalLM",  # the name in config.json of the first files
    "MptForCausalLM": "nanovllm.models.mpt:MptForCausalLM",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "nanovllm.models.qwen3_moe:Qwen3MoeForCausalLM",
    "RWForCausalLM": "nanovllm.models.falcon:FalconForCausalLM",  # Falcon before it was in transformers
}


_FALLBACK = "nanovllm.models.transformers_model:TransformersForCausalLM"


def model_class(
    architectures: Sequence[str], *, model_impl: str = "auto", model_plugin: str | None = None
) -> type[CausalLM]:
    """The class for config.json's `architectures`, imported now.

    model_impl, model_plugin: see EngineConfig. Raises ConfigError for a plugin file that does not fit, and
    ModelNotSupported, which lists what exists; where that is for transformers to say, config_class raises it.
    """
    if model_impl != "transformers":
        found = _from_file(model_plugin, architectures) if model_plugin else _REGISTRY.find(architectures)
        if found is not None:
            return found
        named = ", ".join(architectures) or "(none named in config.json)"
        if model_impl == "nanovllm":
            raise ModelNotSupported(
                f"architecture {named} is not supported with model_impl='nanovllm'; supported: "
                f"{', '.join(supported_architectures())}"
            )
        logger.warning("no file here runs %s: trying transformers' modules", named)
    return _load(_FALLBACK, "the fallback")


def register_model(architecture: str, model: type[CausalLM] | str) -> None:
    """Let `model` run every checkpoint whose config.json names `architecture`, in this process.

    model: a subclass of nanovllm.models.base.CausalLM, or "module:Class" to import it when it is needed.
    It goes before what installed packages bring and what is built in. Raises ConfigError if it is no
    such class, or if another one has that name already; the same one may be registered again.
    """
    _REGISTRY.register(architecture, model)


def supported_architectures() -> dict[str, str]:
    """{architecture: the module that runs it}, without importing any."""
    return {name: place.partition(":")[0] for name, place in _REGISTRY.places().items()}


class Registry:
    """Registered classes, then those of installed packages, then the built-in ones."""

    def __init__(self, built_in: Mapping[str, str]) -> None:
        """built_in: {architecture: "module:Class"}."""
        self._built_in = built_in
        self._registered: dict[str, type[CausalLM] | str] = {}

    def register(self, architecture: str, model: type[CausalLM] | str) -> None:
        if not isinstance(architecture, str) or not architecture.isidentifier():
            raise ConfigError(f"register_model: {architecture!r} is no architecture as config.json names them")
        if isinstance(model, str):
            if not re.fullmatch(r"[\w.]+:\w+", model):
                raise ConfigError(f"register_model({architecture!r}): {model!r} is not of the form 'module:Class'")
        else:
            _require_causal_lm(model, f"register_model({architecture!r})")
        known = self._registered.get(architecture)
        if known is not None and _place(known) != _place(model):
            raise ConfigError(
                f"register_model({architecture!r}): {_place(known)} has that name already, not {_place(model)}"
            )
        self._registered[architecture] = model

    def places(self) -> dict[str, str]:
        """{architecture: "module:Class"} of all, the one that would run."""
        installed = {point.name: point.value for point in _entry_points()}
        registered = {name: _place(model) for name, model in self._registered.items()}
        return {**self._built_in, **installed, **registered}

    def find(self, architectures: Sequence[str]) -> type[CausalLM] | None:
        """The class for the first of the architectures that has one; imports no other."""
        for name in architectures:
            if name in self._registered:
                model = self._registered[name]
                self.announce(name, _place(model))
                return _load(model, f"register_model({name!r})") if isinstance(model, str) else model
            points = [point for point in _entry_points() if point.name == name]
            if len({point.value for point in points}) > 1:
                offers = ", ".join(sorted(f"{point.value} ({_package(point)})" for point in points))
                raise ModelNotSupported(f"several installed packages run {name}: {offers}; uninstall all but one")
            for point in points:
                self.announce(name, point.value)
                return _load(point.value, f"the installed package {_package(point)}")
            if name in self._built_in:
                return _load(self._built_in[name], "nanovllm")
        return None

    def announce(self, architecture: str, place: str) -> None:
        """Say who runs an architecture that has a file here too."""
        if architecture in self._built_in:
            logger.info("%s runs %s, not nanovllm's own file", place, architecture)


_REGISTRY = Registry(_MODELS)


def _from_file(path: str, architectures: Sequence[str]) -> type[CausalLM]:
    """A plugin's class: one that is defined in the file and has the architecture's name."""
    from nanovllm.models.base import CausalLM

    module = _import_file(Path(path))
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, CausalLM) and value.__module__ == module.__name__
    }
    for name in architectures:
        if name in classes:
            _require_causal_lm(classes[name], f"model_plugin={path!r}")
            _REGISTRY.announce(name, path)
            return classes[name]
    raise ConfigError(
        f"model_plugin={path!r} defines no subclass of CausalLM named {' or '.join(architectures) or '(none)'}, as "
        f"config.json asks; it defines {', '.join(classes) or 'none'}"
    )


def _import_file(path: Path) -> Any:
    """Run a Python file as a module of its own, anew each time."""
    name = "nanovllm_plugin_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"model_plugin={str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"model_plugin={str(path)!r} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load(place: str, origin: str) -> type[CausalLM]:
    module, _, name = place.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)
    except Exception as error:  # somebody else's module
        raise ModelNotSupported(f"{origin}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    _require_causal_lm(model, origin)
    return model


def _require_causal_lm(model: Any, origin: str) -> None:
    from nanovllm.models.base import CausalLM

    if not (isinstance(model, type) and issubclass(model, CausalLM)):
        raise ConfigError(f"{origin}: {model!r} is no subclass of nanovllm.models.base.CausalLM")
    if not isinstance(getattr(model, "config_class", None), type):
        raise ConfigError(f"{origin}: {model.__name__} lacks a config_class")


def _place(model: type[CausalLM] | str) -> str:
    return model if isinstance(model, str) else f"{model.__module__}:{model.__qualname__}"


def _entry_points() -> Iterable[EntryPoint]:
    """Of all installed packages, read but not imported."""
    from importlib.metadata import entry_points  # 30 ms that `import nanovllm` need not wait for

    return entry_points(group=ENTRY_POINTS)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"
