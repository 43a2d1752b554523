"""Variant: one compilation of a Triton kernel that a launch function may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

CHIPS = (75, 80, 90)
AMPERE_ON = (80, 90)  # bfloat16 and asynchronous copies


def launch_options(num_warps: int, num_stages: int = 3, maxnreg: int | None = None) -> dict[str, Any]:
    """What every launch gives beside arguments; fusion is named because its default differs between Tritons. maxnreg:
    registers that a thread may have: ptxas, left alone, spills some to stay below a round number of them."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if maxnreg is None else {**options, "maxnreg": maxnreg}


def multiplies_fast(x: torch.Tensor) -> bool:
    """Whether tensor cores multiply such numbers for Triton: those of 16 bits, from Ampere on. Others want small
    tiles."""
    return x.dtype.itemsize == 2 and (x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0))


@dataclass(frozen=True)
class Variant:
    """A kernel with all that decides its machine code, so that it can be compiled where there is no GPU.

    `variants()` of each file in this folder lists what its launch functions choose from. Tests compile every one for
    its chips.

    kernel: the @triton.jit function.
    types: of the arguments that are no constexpr, as Triton writes them: "*bf16", "i32", "fp32"; with
        ":16" behind it if pointers and numbers given at run time are multiples of 16, as Triton then
        compiles for that. A number that is 1 at run time is a constexpr, and so is None.
    constexprs: the other arguments.
    chips: compute capabilities that it is for, times ten.
    """

    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    chips: tuple[int, ...] = CHIPS
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        given = {*self.types, *self.constexprs}
        if given != set(self.kernel.arg_names):
            raise AssertionError(f"{self.kernel.__name__}: {given ^ set(self.kernel.arg_names)} given or not, wrongly")
