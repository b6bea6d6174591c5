"""Compiles the band kernel without a GPU and reads what the assembler says of it.

    python -m ringattn.benchmarks.triton_compile [default sm_80 sm_90 sm_100] [--dims 128]

For every architecture: each shipped configuration (kernel × head dim × element size), plain and
with softcap and listed columns, with registers a thread, shared memory and spilled bytes. Exits
with 1 if one spills or exceeds the shared memory of its architecture. Needs no GPU and must not
run under TRITON_INTERPRET.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ringattn.kernels.triton_band import MARGIN, MOST_DIM
from ringattn.kernels.triton_configs import BlockConfig, Part, block_config
from ringattn.kernels.triton_launch import call, interpreted, kernel
from ringattn.kernels.work_lists import WorkList

SHARED_LIMIT = {"default": 101_376, "sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute
capabilities: 163 KiB and 227 KiB; "default" serves what has least, 99 KiB on sm_86 and sm_89)."""

PARTS: tuple[Part, ...] = ("forward", "keys", "keys_only", "queries")
DIMS = (64, 128, 256)
DTYPES = {2: "bf16", 4: "fp32"}
ROWS, GROUP, CAP = 4096, 8, 30.0  # of the operands compiled for


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    softcap, listed, shared: the kernels' constants; see `ringattn.kernels.triton_forward`.
    """

    arch: str
    part: Part
    head_dim: tuple[int, int]
    itemsize: int
    config: BlockConfig
    softcap: bool = False
    listed: bool = False
    shared: bool = False
    step: int = 1


@dataclass(frozen=True)
class Resources:
    """What the assembler reports: registers a thread, bytes of shared memory, bytes spilled, and
    whether it had to wait after every matrix instruction for want of registers, and whether all it
    made is a trap, as triton does where tensor memory is too small."""

    registers: int
    shared: int
    spilled: int
    serialized: bool
    trapped: bool


def shipped(arch: str) -> Iterator[Variant]:
    """All that the shipped table gives to an architecture, for columns in runs and listed."""
    for part, itemsize, dim, softcap, listed in itertools.product(
        PARTS, DTYPES, DIMS, (False, True), (False, True)
    ):
        if dim <= MOST_DIM[itemsize]:
            config = block_config(arch, part, dim, itemsize, softcap=softcap, listed=listed)
            plain = Variant(arch, part, (dim, dim), itemsize, config, softcap, listed)
            yield from variants(plain)


def variants(plain: Variant) -> Iterator[Variant]:
    """A variant, and with shared rows where it may have them."""
    yield plain
    if plain.part == "keys":
        yield replace(plain, shared=True)


def compiled(variant: Variant) -> Resources:
    """Compiles a variant as a launch would, and reads the assembler's report.

    The binary goes to Triton's cache, where a launch with such operands on such a device finds it.
    """
    from triton.runtime import driver

    operands, work = _operands(variant), _work(variant)
    arguments, constants = call(
        variant.part, work, operands, GROUP, 1.0,
        CAP if variant.softcap else None, shared=variant.shared,
    )  # fmt: skip
    driver.set_active(_Target(variant.arch))  # pyright: ignore[reportArgumentType]
    try:
        made = kernel(variant.part).warmup(*arguments, grid=(1, 1), **constants)
    finally:
        if torch.cuda.is_available():  # elsewhere there is none to go back to
            driver.reset_active()
    registers, spilled, serialized = _assembled(made.asm["ptx"], variant.arch)
    trapped = re.search(r"^\s*trap;", made.asm["ptx"], re.MULTILINE) is not None
    return Resources(registers, made.metadata.shared, spilled, serialized, trapped)


@dataclass(frozen=True)
class _Target:
    """Stands for a device of an architecture in Triton's runtime, which compiles but cannot launch.

    Triton keeps what it compiled by device; the architecture's name is one that no device has.
    """

    arch: str

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _capability(self.arch), 32)


def _operands(variant: Variant) -> tuple[torch.Tensor, ...]:
    """Operands without memory. Their sizes, past being multiples of 16, do not matter."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[variant.itemsize]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, dout = (empty(1, ROWS, 2 * GROUP, d, dtype=dtype) for d in variant.head_dim)
    k, v = (empty(1, ROWS, 2, d, dtype=dtype) for d in variant.head_dim)
    if variant.part == "forward":
        return q, k, v, empty(*dout.shape), empty(1, ROWS, 2 * GROUP)
    grads = tuple(empty(*x.shape) for x in (q, k, v))
    made = (q, k, v, dout, empty(1, 2 * GROUP, 2, ROWS + MARGIN), *grads)
    return made[:6] if variant.part == "queries" else made


def _work(variant: Variant) -> WorkList:
    """A work list without memory."""

    def table(columns: int) -> torch.Tensor:
        return torch.empty(1, columns, dtype=torch.int32, device="meta")

    return WorkList(
        config=variant.config, step=variant.step, listed=variant.listed, works=table(4),
        items=table(4), refs=table(6), ranges=table(2), entries=table(3),
    )  # fmt: skip


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 80


def _assembled(ptx: str, arch: str) -> tuple[int, int, bool]:
    """(registers, spilled bytes, serialized) by the assembler that comes with triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    tool = blackwell if _capability(arch) >= 100 and blackwell.exists() else folder / "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, "PTX names its target"
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [tool, "-v", f"-arch={target[1]}", str(source), "-o", str(source) + ".cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(registers[1]), sum(map(int, spills)), "are serialized" in done.stderr + done.stdout


def problem(variant: Variant, used: Resources) -> str:
    """Why a variant may not ship, or ''."""
    if used.spilled:
        return f"{used.spilled} bytes spilled"
    if used.trapped:
        return "does not fit into tensor memory"
    if used.serialized:
        return "matrix instructions serialized"
    limit = SHARED_LIMIT.get(variant.arch, SHARED_LIMIT["default"])
    return f"{used.shared} bytes of shared memory, limit {limit}" if used.shared > limit else ""


def describe(variant: Variant, used: Resources) -> str:
    """One line of the table."""
    c = variant.config
    flags = [n for n in ("softcap", "listed", "shared") if getattr(variant, n)]
    return (
        f"{variant.arch:7} {variant.part:8} {variant.head_dim[0]:4} {DTYPES[variant.itemsize]:5}"
        f"{c.rows:4} x {c.columns:<4} warps {c.warps} stages {c.stages} {'tma' if c.tma else '   '}"
        f"{used.registers:5} registers {used.shared:7} B shared {used.spilled:5} B spilled"
        f"  {' '.join(flags):24}{problem(variant, used)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compiles and prints; see the module docstring."""
    parser = argparse.ArgumentParser(description="Compile the band kernel without a GPU.")
    parser.add_argument("archs", nargs="*", default=list(SHARED_LIMIT), help="as in the table")
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS), choices=DIMS)
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES.values()), choices=DTYPES.values(),
        help="bf16 stands for fp16 too",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    unknown = set(asked.archs) - set(SHARED_LIMIT)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}: use some of {', '.join(SHARED_LIMIT)}")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: triton interprets instead of compiling; unset it")
    bad = count = 0
    for arch in asked.archs:
        for variant in shipped(arch):
            if (
                variant.head_dim[0] not in asked.dims
                or DTYPES[variant.itemsize] not in asked.dtypes
            ):
                continue
            used = compiled(variant)
            count += 1
            bad += bool(problem(variant, used))
            print(describe(variant, used), flush=True)
    if not count:
        parser.error(f"fp32 head dims go up to {MOST_DIM[4]}: ask for smaller --dims")
    print(f"{bad} of {count} configurations may not ship" if bad else f"all {count} fit, no spills")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
