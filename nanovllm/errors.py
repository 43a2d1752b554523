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


class WorkerDied(NanoVLLMError, RuntimeError):
    """A rank's process ended, failed in a step or stopped answering, and all others were ended: create a new
    LLM.

    rank: whose. cause: a signal's name, an exit code, or the first line of its error. details: its traceback,
        or where every rank was; may be empty.
    """

    def __init__(self, rank: int, cause: str, details: str = "") -> None:
        super().__init__(rank, cause, details)
        self.rank, self.cause, self.details = rank, cause, details

    def __str__(self) -> str:
        return f"rank {self.rank} {self.cause}; create a new LLM" + (f"\n{self.details}" if self.details else "")


class RanksDiffer(NanoVLLMError, RuntimeError):
    """Processes that torchrun started made different calls: all must make the same ones in the same order."""


class EngineClosed(NanoVLLMError, RuntimeError):
    """The engine was closed; create a new one."""
