"""Settings: quantization_config of a config.json, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ModelNotSupported


class Settings:
    """Every answer is one that there is code for; else ModelNotSupported says which is not."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """where: for messages."""
        self._config, self._where = config, where

    def get(self, key: str) -> Any:
        return self._config.get(key)

    def names(self) -> tuple[str, ...]:
        return tuple(self._config)

    def first(self, *keys: str) -> str:
        """The first of these keys that has a value, else the last."""
        return next((key for key in keys if self._config.get(key) is not None), keys[-1])

    def within(self, key: str) -> Settings:
        """What is under a key; no settings where it has no value."""
        found = self._config.get(key) or {}
        if not isinstance(found, Mapping):
            raise self.unsupported(f"{key}={found!r}", "it must hold settings of its own")
        return Settings(found, f"{self._where}, {key}")

    def choice(self, key: str, *supported: Any, default: Any = None) -> Any:
        """The value of a key, or `default` where there is none."""
        value = self._config.get(key)
        value = default if value is None else value
        if value not in supported or type(value) is not type(supported[supported.index(value)]):
            raise self.unsupported(f"{key}={value!r}", f"supported: {', '.join(map(repr, supported))}")
        return value

    def group_size(self, key: str = "group_size") -> int | None:
        """Columns that share a scale; None for all of a row."""
        value = self._config.get(key)
        if value == -1:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.unsupported(f"{key}={value!r}", "it must be a number of columns, or -1 for whole rows")
        return value

    def refuse(self, *keys: str) -> None:
        """What would change the meaning of weights."""
        for key in keys:
            if self._config.get(key):
                raise self.unsupported(f"{key}={self._config[key]!r}", "use a version without it")

    def unsupported(self, what: str, advice: str) -> ModelNotSupported:
        return ModelNotSupported(f"{self._where}: {what} is not supported; {advice}")
