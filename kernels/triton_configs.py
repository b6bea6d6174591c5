"""Block sizes of the band kernel: a small table, measured per architecture, shipped as JSON."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

SHIPPED = "triton_configs.json"
Part = Literal["forward", "keys", "keys_only", "queries"]
"""Which kernel: `keys` adds to dk, dv and dq, `keys_only` not to dq, which is left to `queries`."""


@dataclass(frozen=True)
class BlockConfig:
    """How one kernel is compiled.

    rows: rows of a program. columns: rows of the other side visited at once. warps: of a program.
    stages: column blocks in flight. tma: blocks travel by TMA where operands allow it.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    tma: bool = False


def block_config(
    arch: str, part: Part, head_dim: int, itemsize: int, *, softcap: bool
) -> BlockConfig:
    """The shipped configuration.

    Args:
        arch: "sm_90" and so on; one that the table lacks takes "default".
        part: which kernel.
        head_dim: the larger of both head dims, at most 256 (128 in float32).
        itemsize: bytes of an element of q. softcap: whether scores are capped.
    """
    table = _table()
    of_part = table.get(arch, table["default"])[config_name(part, itemsize, softcap=softcap)]
    fitting = min(int(dim) for dim in of_part if int(dim) >= head_dim)
    rows, columns, warps, stages, *tma = of_part[str(fitting)]
    return BlockConfig(rows, columns, warps, stages, bool(tma))


def config_name(part: Part, itemsize: int, *, softcap: bool) -> str:
    """The table's name of a kernel: both 16-bit dtypes share one."""
    return part + ("-softcap" if softcap else "") + ("-fp32" if itemsize == 4 else "")


@cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(files("ringattn.kernels").joinpath(SHIPPED).read_text())
