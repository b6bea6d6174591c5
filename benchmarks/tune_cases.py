"""What is tuned: the kernels of the band kernel's table, in order, and block sizes to try."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from ringattn.benchmarks.triton_compile import PARTS, SHARED_LIMIT, Resources, Variant, problem
from ringattn.benchmarks.triton_compile import variants as all_variants
from ringattn.kernels.triton_band import MOST_DIM
from ringattn.kernels.triton_configs import LISTED, BlockConfig, Part, block_config, config_name

DIMS = (128, 64, 256)
FIRST = ("forward", "keys")
ROWS, COLUMNS, WARPS, STAGES = (16, 32, 64, 128, 256), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
MOST_REGISTERS = 232
"""Of a thread, for accumulators and scores. Beyond, nothing is left for operands and addresses."""


@dataclass(frozen=True)
class Entry:
    """One cell of the table: a kernel, head dim, bytes of an element, softcap, listed columns."""

    part: Part
    head_dim: int
    itemsize: int = 2
    softcap: bool = False
    listed: bool = False

    @property
    def name(self) -> str:
        """The table's name of the kernel."""
        return config_name(self.part, self.itemsize, softcap=self.softcap) + LISTED * self.listed

    def __str__(self) -> str:
        return f"{self.name}-d{self.head_dim}"

    def variants(self, arch: str, config: BlockConfig) -> list[Variant]:
        """All that must compile well where the configuration ships."""
        dims = (self.head_dim, self.head_dim)
        plain = Variant(
            arch, self.part, dims, self.itemsize, config, softcap=self.softcap, listed=self.listed
        )
        return list(all_variants(plain))


def entries(
    parts: Iterable[str] = PARTS,
    dims: Iterable[int] = DIMS,
    dtypes: Iterable[str] = ("bf16", "fp32"),
    softcaps: Iterable[bool] = (False, True),
) -> list[Entry]:
    """The cells with such properties, most wanted first: 16 bits without softcap, head dim 128."""
    sizes = {"bf16": 2, "fp32": 4}
    made = [
        Entry(part, dim, sizes[dtype], softcap, listed)
        for part, dim, dtype, softcap, listed in product(
            PARTS, DIMS, sizes, (False, True), (False, True)
        )
        if part in parts and dim in dims and dtype in dtypes and softcap in softcaps
    ]
    possible = [entry for entry in made if entry.head_dim <= MOST_DIM[entry.itemsize]]
    return sorted(possible, key=_importance)


def _importance(entry: Entry) -> tuple:
    later, place = entry.part not in FIRST, DIMS.index(entry.head_dim)
    rare = (entry.itemsize, entry.softcap, place == 2, later)
    return *rare, place, entry.listed, PARTS.index(entry.part)


def shipped(entry: Entry, arch: str) -> BlockConfig:
    """What the table says now."""
    return block_config(
        arch, entry.part, entry.head_dim, entry.itemsize, softcap=entry.softcap,
        listed=entry.listed,
    )  # fmt: skip


def candidates(entry: Entry, arch: str, most: int) -> list[BlockConfig]:
    """The shipped configuration, then others, those most like it first; `most` in all."""
    now = shipped(entry, arch)
    made = [c for c in _product(arch) if _conceivable(entry, arch, c) and c != now]
    return [now, *sorted(made, key=lambda config: unlike(config, now))][:most]


def _product(arch: str) -> Iterator[BlockConfig]:
    tma = (False, True) if arch.startswith("sm_") and int(arch[3:]) >= 90 else (False,)
    for values in product(ROWS, COLUMNS, WARPS, STAGES, tma):
        yield BlockConfig(*values)


def _conceivable(entry: Entry, arch: str, config: BlockConfig) -> bool:
    """Whether accumulators may fit into registers and column blocks into shared memory."""
    rows, columns, dim = config.rows, config.columns, entry.head_dim
    held = rows * (dim + columns)
    if entry.part in ("keys", "keys_only"):
        held = 2 * rows * (dim + columns) + columns * dim * (entry.part == "keys")
    memory = 2 * config.stages * columns * dim * entry.itemsize
    limit = SHARED_LIMIT.get(arch, SHARED_LIMIT["default"])
    return held <= 32 * config.warps * MOST_REGISTERS and memory <= limit


def unlike(a: BlockConfig, b: BlockConfig) -> float:
    """How far two configurations are apart, in doublings of rows, columns and rows of a warp."""
    sizes = ((a.rows, b.rows), (a.columns, b.columns), (a.rows / a.warps, b.rows / b.warps))
    doublings = sum(abs(math.log2(x / y)) for x, y in sizes)
    return doublings + abs(a.stages - b.stages) / 2 + (a.tma != b.tma) / 2


def fault(variants: Iterable[Variant], used: Iterable[Resources | str]) -> str:
    """Why a configuration is not timed, or ''; a text in place of resources is a failure."""
    for variant, found in zip(variants, used, strict=True):
        reason = found if isinstance(found, str) else problem(variant, found)
        if reason:
            flags = [name for name in ("listed", "shared") if getattr(variant, name)]
            return f"{reason} ({', '.join(flags) or 'plain'})"
    return ""


def as_text(config: BlockConfig) -> str:
    """The configuration in a record's case."""
    return (
        f"{config.rows}x{config.columns}-w{config.warps}-s{config.stages}{'-tma' * config.tma}"
    )  # fmt: skip
