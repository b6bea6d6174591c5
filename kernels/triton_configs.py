"""Block sizes of the band kernel: a small table, measured per architecture, shipped as JSON."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Part = Literal["forward", "keys", "queries"]


@dataclass(frozen=True)
class BlockConfig:
    """How one kernel is compiled.

    rows: rows of a program. columns: rows of the other side visited at once. warps: of a program.
    stages: column blocks in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def block_config(arch: str, part: Part, head_dim: int, itemsize: int) -> BlockConfig:
    """The shipped configuration.

    Args:
        arch: "sm_90" and so on; one that the table lacks takes "default".
        part: which kernel.
        head_dim: the larger of both head dims, at most 256.
        itemsize: bytes of an element of q; 4-byte elements have configurations of their own.
    """
    table = _table()
    of_arch = table.get(arch, table["default"])
    of_part = (
        of_arch.get(f"{part}-4" if itemsize == 4 else part)
        or table["default"][f"{part}-4" if itemsize == 4 else part]
    )
    fitting = min(int(dim) for dim in of_part if int(dim) >= head_dim)
    return BlockConfig(*of_part[str(fitting)])


@cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(files("ringattn.kernels").joinpath("triton_configs.json").read_text())
