"""The errors a user can meet. Each message says what to change."""


class NanoVLLMError(Exception):
    """Base of every error that nanovllm raises on purpose."""


class ConfigError(NanoVLLMError, ValueError):
    """An engine option is unknown, out of range, or does not fit this machine."""


class RequestError(NanoVLLMError, ValueError):
    """One request is wrong (prompt or sampling parameters); other requests are untouched."""


class ModelNotFound(NanoVLLMError, OSError):
    """A model's files cannot be found, fetched or verified."""


class ModelNotSupported(NanoVLLMError, ValueError):
    """The files are fine, but no code here runs this architecture or this variant of it."""


class WeightError(NanoVLLMError, RuntimeError):
    """The tensors on disk do not match the model: missing, unexpected, misshapen or corrupt."""


class PeerLost(NanoVLLMError, RuntimeError):
    """A rank of the tensor-parallel group did not come when the others needed it: it died, hangs, or was closed."""

    def __init__(self, message: str = "another rank died, hangs or was closed; this one cannot go on") -> None:
        super().__init__(message)


class EngineClosed(NanoVLLMError, RuntimeError):
    """The engine was closed; create a new one."""
