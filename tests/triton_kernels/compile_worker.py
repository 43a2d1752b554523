"""Compiles Triton kernels ahead of time, in a process of its own: the tests' own process interprets them.

Reads lines of JSON {"module": ..., "chip": ...} and answers each with a line: a list of what each variant for that chip
takes, or the error. With "at_random" it is so many cases of that attention kernel that a model might have.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanovllm.triton_kernels.attention_tile import Case
from nanovllm.triton_kernels.variant import Variant, launch_options

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Compiled:
    """registers: of a thread. stack: bytes of a thread that went to memory, where spilled registers go.
    shared: bytes of a block. ahead: groups of asynchronous copies that are still under way while a loop computes."""

    kernel: str
    what: str
    chip: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    ahead: int = 0
    error: str | None = None


def source(variant: Variant) -> ASTSource:
    names = variant.kernel.arg_names
    types = {name: kind.split(":") for name, kind in variant.types.items()}
    return ASTSource(
        fn=variant.kernel,
        signature={name: types[name][0] if name in types else "constexpr" for name in names},
        constexprs=dict(variant.constexprs),
        attrs={
            (i,): [["tt.divisibility", int(types[name][1])]]
            for i, name in enumerate(names)
            if len(types.get(name, ())) == 2
        },
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def compiled(variant: Variant, chip: int) -> Compiled:
    kinds = ", ".join(f"{k} {v}" for k, v in variant.types.items() if v.startswith("*"))
    sizes = ", ".join(f"{k} {v}" for k, v in variant.constexprs.items())
    result = Compiled(
        variant.kernel.__name__, f"{kinds}; {sizes}; {variant.num_warps} warps, {variant.num_stages} stages", chip
    )
    options = launch_options(variant.num_warps, variant.num_stages, variant.maxnreg)
    try:
        binary = triton.compile(source(variant), target=GPUTarget("cuda", chip, 32), options=options)
    except Exception:
        result.error = traceback.format_exc()
        return result
    result.shared = binary.metadata.shared
    result.ahead = max(map(int, re.findall(r"ttg\.async_wait .*num = (\d+)", binary.asm["ttgir"])), default=0)
    result.registers, result.stack = resources(binary.asm["cubin"])
    return result


def answer(request: dict) -> list[dict]:
    module, chip = importlib.import_module(request["module"]), request["chip"]
    if "at_random" in request:
        variants = [module.variant(*setting) for setting in drawn(chip, request["at_random"])]
    else:
        variants = [variant for variant in module.variants() if chip in variant.chips]
    return [asdict(compiled(variant, chip)) for variant in variants]


def drawn(chip: int, count: int) -> Iterator[tuple[Case, int, bool]]:
    """Attention that TritonAttention takes, and a flag of the kernel's own."""
    rng = random.Random(chip)
    for _ in range(count):
        dtype, codes = rng.choice(("bf16", "fp16", "fp32")), rng.random() < 0.4
        head_dim = rng.choice((64, 80, 96, 112, 128, 192, 256)[: 5 if codes and dtype == "fp32" else None])
        group, windowed = rng.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 29, 32, 40, 48, 71)), rng.random() < 0.5
        bias, block_size = rng.choice(("none", "distance", "rounded")), 16 << rng.randrange(5)
        yield Case(dtype, head_dim, group, windowed, bias, block_size, codes), chip, rng.random() < 0.5


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no answer
    gc.freeze()  # torch's and Triton's objects, which each collection would look through
    for line in sys.stdin:
        try:
            reply = {"compiled": answer(json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
