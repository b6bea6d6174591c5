"""Block sizes of the band kernel: a small table, measured per architecture, shipped as JSON."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

SHIPPED, LISTED = "triton_configs.json", "-listed"
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
    arch: str, part: Part, head_dim: int, itemsize: int, *, softcap: bool, listed: bool = False
) -> BlockConfig:
    """The shipped configuration.

    Args:
        arch: "sm_90" and so on; one that the table lacks takes "default".
        part: which kernel.
        head_dim: the larger of both head dims, at most 256 (128 in float32).
        itemsize: bytes of an element of q. softcap: whether scores are capped.
        listed: whether columns are listed; as otherwise, unless the table says so.
    """
    table = _table()
    of_arch = table.get(arch, table["default"])
    name = config_name(part, itemsize, softcap=softcap)
    fitting = str(min(int(dim) for dim in of_arch[name] if int(dim) >= head_dim))
    found = of_arch[name][fitting]
    if listed:
        found = of_arch.get(name + LISTED, {}).get(fitting, found)
    rows, columns, warps, stages, *tma = found
    return BlockConfig(rows, columns, warps, stages, bool(tma))


def config_name(part: Part, itemsize: int, *, softcap: bool) -> str:
    """The table's name of a kernel: both 16-bit dtypes share one."""
    return part + ("-softcap" if softcap else "") + ("-fp32" if itemsize == 4 else "")


@cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(files("ringattn.kernels").joinpath(SHIPPED).read_text())
