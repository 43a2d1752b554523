"""Ops of csrc/: CPU kernels whose rows do not know of one another."""

from __future__ import annotations

import math

import torch

from nanovllm.batch import Batch
from nanovllm.cache_spec import StateSpec
from nanovllm.errors import ConfigError
from nanovllm.host_memory import mapped_zeros
from nanovllm.ops.formats import Codes, Format, Packed, Segment
from nanovllm.ops.library import Library
from nanovllm.ops.mamba2 import Mamba2Sizes, Mamba2Weights, SumOverRanks
from nanovllm.ops.native_sampling import NativeSampling
from nanovllm.ops.recorder import NativeRecorder
from nanovllm.ops.torch_activation import activate
from nanovllm.ops.torch_quantize import found_codes

_PANEL = 16  # rows of a weight that lie side by side once packed; csrc/kernels.h
_STRIP = 32  # channels of a Mamba2 layer that lie side by side in its state; csrc/kernels.h
_FP32, _BF16 = 0, 1  # weights' formats; csrc/formats.h
_ACTIVATIONS = {"silu": 1, "swish": 1, "gelu": 2, "gelu_fast": 3, "gelu_new": 3, "gelu_pytorch_tanh": 3, "relu": 4}


class NativeOps:
    """The hidden stream is fp32; weights are bfloat16 or fp32. Rows that meet bfloat16 weights are rounded
    inside. A row's bits depend neither on the other rows nor on their number, nor on the threads."""

    name = "native"
    embeds_packed = True
    packs_quantized = True
    norms_and_rotates = False

    def __init__(self, library: Library, *, quantize_activations: bool = False) -> None:
        """quantize_activations: rows that meet codes that are integers are rounded to 8 bits, with a scale for each
        32 columns; the level must have products of them."""
        assert library.eight_bit or not quantize_activations
        self._library, self._eight_bit = library, quantize_activations
        self.sampling = NativeSampling(library)
        self._weights = _Arena()

    @staticmethod
    def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        return None if dtype in (torch.bfloat16, torch.float32) else f"has no kernels for {dtype}"

    def hidden_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        return True

    def packed_numel(self, rows: int, cols: int, dtype: torch.dtype) -> int:
        return math.prod(_packed_shape(rows, cols, dtype))

    def fuses(self, act: str) -> bool:
        return act in _ACTIVATIONS

    def pack(self, weight: torch.Tensor, *, gated: bool, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, cols = weight.shape
        shape = _packed_shape(rows, cols, weight.dtype)
        packed = self._weights.zeros(shape, weight.dtype) if out is None else out.view(shape)
        parts = weight.chunk(2) if gated else (weight,)
        for i, part in enumerate(parts):
            part = part.contiguous()
            address, size = part.data_ptr(), part.itemsize
            self._library.pack(address, packed.data_ptr(), *part.shape, size, i, len(parts), torch.get_num_threads())
        return packed

    def zeros(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        return self._weights.zeros((num_bytes,), torch.uint8)

    def codes_bytes(self, form: Format, rows: int, cols: int) -> int:
        if self._eight_bit and form.e4m3:
            raise ConfigError(
                "quantize_activations=True takes codes that are integers on CPUs, and this checkpoint's are float8; "
                "leave it out"
            )
        return form.packed_bytes(rows, cols)

    def pack_codes(self, codes: Codes, first: int, out: torch.Tensor, *, half: int | None = None) -> None:
        numbers = codes.codes.contiguous()
        given = (codes.scales, codes.least, codes.outer, codes.outer_least)
        values = [codes.scales if v is None else v.contiguous() for v in given]  # what is not there is not read
        self._library.pack_quantized(
            *(codes.form.number, numbers.data_ptr(), *(v.data_ptr() for v in values), *numbers.shape),
            *(first, -1 if half is None else half, out.data_ptr(), torch.get_num_threads()),
        )

    def quantize(self, weight: torch.Tensor, form: Format) -> Codes:
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.float()
        (rows, cols), bf16 = weight.shape, weight.dtype == torch.bfloat16
        weight, groups = weight.contiguous(), -(-cols // form.group)
        codes, scales = torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows, groups, dtype=form.scale)
        halves = torch.empty(rows, groups if form.least else 1, dtype=torch.float16)
        addresses = (x.data_ptr() for x in (codes, scales, halves))
        self._library.quantize(form.number, weight.data_ptr(), bf16, rows, cols, *addresses, torch.get_num_threads())
        return found_codes(form, codes, scales, halves)

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor | Packed,
        rows: int,
        bias: torch.Tensor | None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """With an activation, rounded to bfloat16 unless the weight is fp32, as the next linear layer would do
        anyway."""
        out = torch.empty(len(x), rows, dtype=torch.float32 if act is None else _fed_dtype(packed))
        if isinstance(packed, torch.Tensor):
            return self._linear(x, packed, _format(packed), None, bias, out, act, residual=residual)
        for segment in packed.segments:
            mine, whole = segment.rows, len(packed.segments) == 1
            self._linear(
                x,
                packed.data if whole else packed.data[segment.start :],
                _number(segment),
                packed.columns,
                bias if whole or bias is None else bias[mine],
                out if whole else out[:, mine],
                act,
                residual=residual if whole or residual is None else residual[:, mine],
            )
        return out

    def plain_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError("all weights are packed")

    def activate(self, x: torch.Tensor, act: str, *, gated: bool) -> torch.Tensor:
        return activate(x, act, gated=gated)

    def gated_linear(
        self, x: torch.Tensor, packed: torch.Tensor | Packed, rows: int, bias: torch.Tensor | None, act: str
    ) -> torch.Tensor:
        """Rounded in the same way."""
        data, form = _whole(packed)
        out = torch.empty(len(x), rows // 2, dtype=_fed_dtype(packed))
        return self._linear(x, data, form, _columns(packed), bias, out, act, gated=True)

    def _linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        form: int,
        columns: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        act: str | None = None,
        *,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if residual is not None:
            residual = _fp32_rows(residual)
        if x.stride(1) != 1 or (x.dtype != torch.float32 and (x.dtype != torch.bfloat16 or form == _FP32)):
            x = x.float().contiguous()
        count, cols = x.shape
        rows = out.shape[1]
        self._library.linear(
            x.data_ptr(),
            x.stride(0),
            x.dtype == torch.bfloat16,
            packed.data_ptr(),
            form,
            _address(columns),
            _address(bias),
            *((None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))),
            out.data_ptr(),
            out.stride(0),
            out.dtype == torch.bfloat16,
            count,
            rows,
            cols,
            0 if act is None else _ACTIVATIONS[act],
            gated,
            self._eight_bit,
            torch.get_num_threads(),
        )
        return out

    def route(self, scores: torch.Tensor, k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _fp32_rows(scores.contiguous())
        tokens, experts = scores.shape
        weights, chosen = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int32)
        addresses = weights.data_ptr(), chosen.data_ptr()
        self._library.route(scores.data_ptr(), tokens, experts, k, normalise, *addresses, torch.get_num_threads())
        return weights, chosen

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
        x = _fp32_rows(x)
        orders, fed_dtype = (_address(_columns(gate_up)), _address(_columns(down))), _fed_dtype(gate_up)
        (gate_up, gate_up_form), (down, down_form) = _whole(gate_up), _whole(down)
        (tokens, hidden), k, experts = x.shape, chosen.shape[1], len(gate_up)
        out = torch.empty(tokens, hidden)
        index = torch.empty(3 * (experts + 1) + 2 * tokens * k, dtype=torch.int32)
        fed, results = torch.empty(tokens * k, inner, dtype=fed_dtype), torch.empty(tokens * k, hidden)
        self._library.mixture(
            x.data_ptr(),
            x.stride(0),
            weights.data_ptr(),
            chosen.data_ptr(),
            first,
            tokens,
            experts,
            k,
            hidden,
            inner,
            gate_up.data_ptr(),
            down.data_ptr(),
            gate_up[0].nbytes,
            down[0].nbytes,
            gate_up_form,
            down_form,
            *orders,
            _ACTIVATIONS[act],
            self._eight_bit,
            out.data_ptr(),
            index.data_ptr(),
            fed.data_ptr(),
            results.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def gather(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if table.dtype not in (torch.float32, torch.bfloat16) or not table.is_contiguous():
            table = table.float().contiguous()
        return self._gather(table, _format(table), rows, table.shape, 0, is_packed=False)

    def embed(self, table: torch.Tensor, ids: torch.Tensor, first: int) -> torch.Tensor:
        return self._gather(table, _format(table), ids, table.shape, first, is_packed=False)

    def embed_packed(
        self, packed: torch.Tensor | Packed, ids: torch.Tensor, first: int, shape: tuple[int, int]
    ) -> torch.Tensor:
        assert _columns(packed) is None
        return self._gather(*_whole(packed), ids, shape, first, is_packed=True)

    def _gather(
        self, table: torch.Tensor, form: int, ids: torch.Tensor, shape: tuple[int, ...], first: int, *, is_packed: bool
    ) -> torch.Tensor:
        rows, width = shape
        out = torch.empty(len(ids), width)
        self._library.gather(
            *(table.data_ptr(), form, is_packed, first, rows),
            *(ids.data_ptr(), len(ids), width, out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = _fp32_rows(x)
        out = torch.empty(x.shape)
        self._library.rms_norm(*_rows(x), weight.data_ptr(), eps, out.data_ptr(), torch.get_num_threads())
        return out

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        x = _fp32_rows(x)
        out = torch.empty(x.shape)
        offset = None if bias is None else bias.data_ptr()
        self._library.layer_norm(*_rows(x), weight.data_ptr(), offset, eps, out.data_ptr(), torch.get_num_threads())
        return out

    def recorder(self) -> NativeRecorder:
        return NativeRecorder(self._library)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows = _fp32_rows(x)
        out = torch.empty(rows.shape)
        half = cos.shape[-1]
        cos, sin = cos.contiguous(), sin.contiguous()
        self._library.rope(*_rows(rows), cos.data_ptr(), sin.data_ptr(), half, out.data_ptr(), torch.get_num_threads())
        return out.to(x.dtype)

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
        raise NotImplementedError

    def mamba2_states(self, sizes: Mamba2Sizes, dtype: torch.dtype) -> StateSpec:
        """A token's bits are the same however its sequence is cut, so there is no grid."""
        strips = -(-sizes.inner_size // sizes.num_groups // _STRIP)
        history = (sizes.conv_kernel - 1, sizes.conv_size)
        state = (sizes.num_groups * strips, sizes.state_size, _STRIP)
        return StateSpec(shapes=(history, state), dtypes=(torch.float32, torch.float32))

    def plan_mamba2(self, batch: Batch, sizes: Mamba2Sizes) -> Batch:
        return batch

    def mamba2(
        self,
        projected: torch.Tensor,
        weights: Mamba2Weights,
        conv_states: torch.Tensor,
        states: torch.Tensor,
        plan: Batch,
        sum_squares: SumOverRanks | None = None,
    ) -> torch.Tensor:
        sizes, slots = weights.sizes, plan.state_slots
        assert slots is not None and projected.dtype == torch.float32
        out = torch.empty(len(projected), sizes.inner_size)
        squares = None if sum_squares is None else torch.empty(len(projected), 1)
        self._library.mamba2(
            *(projected.data_ptr(), projected.stride(0), out.data_ptr()),
            *(sizes.num_heads, sizes.head_dim, sizes.num_groups, sizes.state_size, sizes.conv_kernel),
            *(*sizes.time_step_limit, sizes.rms_norm_eps),
            *(weights.filters.data_ptr(), weights.conv_bias.data_ptr()),
            *(weights.A.data_ptr(), weights.D.data_ptr(), weights.dt_bias.data_ptr(), weights.norm.data_ptr()),
            *(None if squares is None else squares.data_ptr(),),
            *(conv_states.data_ptr(), states.data_ptr()),
            *(len(projected), len(slots)),
            *(plan.query_start.data_ptr(), plan.seq_lens.data_ptr(), slots.data_ptr(), torch.get_num_threads()),
        )
        if squares is None or sum_squares is None:
            return out
        squares = sum_squares(squares)
        normed = torch.empty(out.shape)
        self._library.rms_scale(
            *(out.data_ptr(), squares.data_ptr(), weights.norm.data_ptr(), *out.shape, sizes.norm_size),
            *(sizes.rms_norm_eps, normed.data_ptr(), torch.get_num_threads()),
        )
        return normed


class _Arena:
    """Memory for weights, a piece after the other: huge pages for small weights as well, so that a step,
    which reads all of them, looks up fewer addresses (docs/benchmarks.md)."""

    _CHUNK = 64 << 20  # bytes

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        used = math.prod(shape) * dtype.itemsize
        size = -(-used // 64) * 64
        if size > len(self._free):
            self._free = mapped_zeros((max(size, self._CHUNK),), torch.uint8)
        taken, self._free = self._free[:used], self._free[size:]
        return taken.view(dtype).view(shape)


def _format(weight: torch.Tensor) -> int:
    return _BF16 if weight.dtype == torch.bfloat16 else _FP32


def _number(segment: Segment) -> int:
    return _BF16 if segment.form is None else segment.form.number


def _whole(packed: torch.Tensor | Packed) -> tuple[torch.Tensor, int]:
    """A weight of one form: its memory, and which."""
    if isinstance(packed, torch.Tensor):
        return packed, _format(packed)
    (segment,) = packed.segments
    return packed.data, _number(segment)


def _columns(packed: torch.Tensor | Packed) -> torch.Tensor | None:
    return None if isinstance(packed, torch.Tensor) else packed.columns


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fed_dtype(packed: torch.Tensor | Packed) -> torch.dtype:
    """Of results that another linear layer takes."""
    return packed.dtype if isinstance(packed, torch.Tensor) else torch.bfloat16


def _packed_shape(rows: int, cols: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """[pairs of panels, steps, 2, 16, columns a step], zeros beyond the weight; where gated, a pair is a panel
    of the gate and one of the other half."""
    per_step = 4 // dtype.itemsize
    return -(-rows // (2 * _PANEL)), -(-cols // per_step), 2, _PANEL, per_step


def _fp32_rows(x: torch.Tensor) -> torch.Tensor:
    """As it is if the kernels can read it."""
    if x.dtype == torch.float32 and x.dim() in (2, 3) and x.stride(-1) == 1:
        return x
    return x.float().contiguous()


def _rows(x: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, outer and inner number of rows, their strides, size."""
    if x.dim() == 2:
        return x.data_ptr(), x.shape[0], 1, x.stride(0), 0, x.shape[1]
    if x.dim() == 3:
        return x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), x.stride(1), x.shape[2]
    size = x.shape[-1]
    return x.data_ptr(), x.numel() // size, 1, size, 0, size
