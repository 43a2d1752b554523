"""Ops: what layers compute with, and which maker's is taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nanovllm.batch import Batch
from nanovllm.cache_spec import StateSpec
from nanovllm.errors import ConfigError
from nanovllm.ops.formats import Codes, Format, Packed
from nanovllm.ops.library import Library, library_or_reason
from nanovllm.ops.logprob_table import LogprobTable
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.native import NativeOps
from nanovllm.ops.recorder import NativeRecorder
from nanovllm.ops.torch_ops import TorchOps
from nanovllm.ops.triton_support import unsupported_reason
from nanovllm.sample_row import SampleRow

logger = logging.getLogger(__name__)


class SamplingOps(Protocol):
    """From fp32 logits [R, V] to tokens, which stay on their device. A row that holds no number draws some token,
    and harms no other."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The first of each row's largest, int64 [R]."""
        ...

    def log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Log probabilities [R, V]."""
        ...

    def token_logprobs(
        self, logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int | None]
    ) -> LogprobTable:
        """For each row [V] of log probabilities: the token of token_ids [R], its rank, and the likeliest `count`
        (-1: all of the vocabulary), ties by token id."""
        ...

    def penalise(self, logits: torch.Tensor, rows: Mapping[int, SampleRow], last: torch.Tensor | None = None) -> None:
        """Repetition (Keskar et al. 2019) over prompt and output, then frequency and presence (the
        OpenAI API's) over the output; in place, in the rows of these numbers.

        last: int64 [R]: the last tokens of the rows that wait for them."""
        ...

    def draw(self, logits: torch.Tensor, rows: Sequence[SampleRow], uniforms: np.ndarray) -> torch.Tensor:
        """Divide by temperature, cut by min_p, top_k, top_p, typical_p in turn, and take the token where the
        mass, summed in the vocabulary's order, first exceeds the row's uniform; int64 [R]."""
        ...


class Ops(Protocol):
    """One object serves all layers. What each gives does not depend on the other rows; its bits do not either, with
    the native ones and with those that `batch_invariant` takes."""

    name: str
    embeds_packed: bool  # whether `embed_packed` takes weights that `pack` packed
    packs_quantized: bool  # whether there is a `pack_codes`, and packed weights may be quantised
    norms_and_rotates: bool  # whether `norm_and_rotate` is better than one after the other

    @property
    def sampling(self) -> SamplingOps: ...

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what flows between layers, of norms' weights and of biases, where weights have `dtype`."""
        ...

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `linear` wants such weights packed; a linear layer then has one of its own."""
        ...

    def packed_numel(self, rows: int, cols: int, dtype: torch.dtype) -> int:
        """Elements of such a weight once packed."""
        ...

    def fuses(self, act: str) -> bool:
        """Whether linear layers can end with this activation."""
        ...

    def pack(self, weight: torch.Tensor, *, gated: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        """[N, K] into the form that `linear` takes, or `gated_linear` where `gated`. out: zeros
        [packed_numel] that the result goes to, where there is a `mixture`."""
        ...

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Memory of the weights' kind, uint8 [num_bytes], for `pack_codes`."""
        ...

    def codes_bytes(self, form: Format, rows: int, cols: int) -> int:
        """Of a weight [rows, cols] that `pack_codes` fills."""
        ...

    def pack_codes(self, codes: Codes, first: int, out: torch.Tensor, *, half: int | None = None) -> None:
        """Codes [N, K] into rows `first`, first + 1, ... of a weight of their form; or, of one that `gated_linear`
        takes, into half 0 or 1. out: uint8 [bytes], zeros where they go."""
        ...

    def quantize(self, weight: torch.Tensor, form: Format) -> Codes:
        """A weight [N, K] of any float dtype in one of the forms that scales are searched for: Q4, Q8_FINE. The same
        bits by every maker on CPUs. A weight that is NaN or infinite makes NaN of its group (Q4) or row (Q8_FINE);
        those that half-precision scales do not reach become infinite or NaN."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor | Packed,
        rows: int,
        bias: torch.Tensor | None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(x [T, K] @ weight.T + bias) -> [T, rows], or the residual [T, rows] plus x @ weight.T + bias."""
        ...

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same by a weight [rows, K] that is not packed, without an activation. The residual's memory may
        become the result's."""
        ...

    def activate(self, x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
        """act(x); where `gated`, act(first half of the columns) * second half: [T, 2 N] -> [T, N]."""
        ...

    def gated_linear(
        self, x: torch.Tensor, packed: torch.Tensor | Packed, rows: int, bias: torch.Tensor | None, act: str
    ) -> torch.Tensor:
        """The weight's and the bias's first half is the gate's: act(gate(x)) * up(x) -> [T, rows / 2]."""
        ...

    def route(self, scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 scores of experts [T, E] -> a token's weights and experts, fp32 and int32 [T, k]: the largest
        scores, best first, of equal ones the lower expert first, and the softmax over these (`normalise`) or
        over all scores."""
        ...

    def mixture(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gate_up: torch.Tensor | Packed,
        down: torch.Tensor | Packed,
        inner: int,
        act: str,
        first: int = 0,
    ) -> torch.Tensor:
        """x [T, H] -> [T, H]: each token through the experts that `route` chose, summed in their order by its weights.
        For an act that `fuses` takes.

        first: the experts here are this one and those that follow; what others would add is left out.
        gate_up, down: [E, packed_numel], experts' weights [2 * inner, H] packed as gated, and [H, inner] packed;
            where weights are not packed, [E, 2 * inner, H] and [E, H, inner].
        """
        ...

    def gather(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T] of table [N, size], in the hidden dtype [T, size]."""
        ...

    def embed(self, table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        """The same for ids [T] of a vocabulary of which the table has `first` and those that follow: zeros for
        an id that it has not."""
        ...

    def embed_packed(
        self, packed: torch.Tensor | Packed, ids: torch.Tensor, first: int, shape: tuple[int, int]
    ) -> torch.Tensor:
        """The same from a packed weight that was of this shape."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., size]; computed in fp32, returned in x's dtype."""
        ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """[..., size]; statistics in fp32."""
        ...

    def recorder(self) -> NativeRecorder | None:
        """None where steps cannot be recorded."""
        ...

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Heads x [T, H, D] by cos and sin [T, 1, R / 2], R <= D; computed in fp32, returned in x's dtype."""
        ...

    def norm_and_rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, H, D] and keys [T, KH, D]: `rms_norm` of each head, then `rotate`."""
        ...

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        """What `mamba2` keeps of a sequence: the convolution's last inputs and the recurrence's state."""
        ...

    def plan_mamba2(self, batch: Batch, sizes: Mamba2Sizes) -> Any:
        """What `mamba2` has to know of a step, made once for all layers."""
        ...

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Any,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        """Convolution, recurrence and gated norm, in fp32: [T, gate | x | B | C | dt] -> [T, inner size].
        The slots' states are brought up to date.

        sum_squares: where the channels of the only group are on several ranks: makes of the sums of this rank's
        squares [T, 1] those of all ranks'."""
        ...


def select_ops(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
    quantize_activations: bool = False,
) -> Ops:
    """The configured maker, or for "auto" the native one on CPUs and the Triton one on GPUs, wherever they can run.

    ConfigError if the configured one cannot run. Where one only was not built or installed, the log tells what is
    lost. batch_invariant: a row's bits do not depend on the others; quantize_activations: rows become 8 bits where
    quantised weights are multiplied so; ConfigError where these cannot be had, or not both.
    """
    if quantize_activations:
        return _eight_bit_ops(name, device, dtype)
    if batch_invariant:
        return _invariant_ops(name, device, dtype)
    if name == "torch":
        return TorchOps()
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        return _triton_ops(name, device)
    reason = NativeOps.unsupported_reason(device, dtype)
    if reason is None:
        library = library_or_reason()
        if isinstance(library, Library):
            return NativeOps(library)
        reason = library
        if name == "auto":
            logger.warning("%s; torch's kernels run instead, at about half the speed", reason)
    if name == "native":
        raise ConfigError(f"kernels='native': {reason}")
    return TorchOps()


def _invariant_ops(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    own = "native" if device.type == "cpu" else "triton"
    taken = own if name == "auto" else name
    if taken not in (own, "triton"):
        raise ConfigError(
            f"batch_invariant=True: kernels={name!r} sums a row in an order that follows the others; "
            f"set kernels={own!r}"
        )
    ops = select_ops(taken, device, dtype)
    if taken == "native":
        return ops
    from nanovllm.ops.invariant_ops import InvariantTritonOps  # triton is an extra

    return InvariantTritonOps()


def _eight_bit_ops(name: str, device: torch.device, dtype: torch.dtype) -> Ops:
    own = "native" if device.type == "cpu" else "triton"
    taken = own if name == "auto" else name
    if taken not in (own, "triton"):
        raise ConfigError(f"quantize_activations=True: kernels={name!r} multiplies in 16 bits; set kernels={own!r}")
    select_ops(taken, device, dtype)
    if taken == "native":
        library = library_or_reason()
        assert isinstance(library, Library)
        if not library.eight_bit:
            raise ConfigError(
                "quantize_activations=True takes AVX512-BF16, VNNI and VBMI, and "
                f"{library.level!r} is the most that kernels may use here; leave it out"
            )
        return NativeOps(library, quantize_activations=True)
    from nanovllm.ops.eight_bit_ops import EightBitTritonOps  # triton is an extra

    return EightBitTritonOps()


def _triton_ops(name: str, device: torch.device) -> Ops:
    reason = unsupported_reason(device)
    if reason is None:
        from nanovllm.ops.triton_ops import TritonOps  # triton is an extra

        return TritonOps()
    if name == "triton":
        raise ConfigError(f"kernels='triton': {reason}")
    logger.warning("Triton %s; torch's kernels run instead, more of them and slower", reason)
    return TorchOps()
