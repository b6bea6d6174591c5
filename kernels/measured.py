"""The measured table: how fast each kernel was on which work, and what that says about other work.

Kernels are compared on the cases that are nearest to the work at hand, by their speed relative to
the fastest kernel of each case, so that cases of different size count alike. The table ships with
the package as `measured.json`; `python -m ringattn.benchmarks.kernels --write-table` fills it.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ringattn.errors import UserError

SHIPPED = Path(__file__).with_name("measured.json")
NEAREST = 4  # cases that are looked at
FAR = 8.0  # a case further away says nothing
MISSING = math.log(1 / 4)  # a kernel without a figure where others have one: refused, out of memory
# What doubling a figure of the work counts for. Head dims and the share of computed pairs that
# count decide how a kernel's blocks fit; speed changes slowly with size, once it is large.
_WEIGHTS = {
    "qk_dim": 2.0,
    "v_dim": 2.0,
    "fill": 2.0,
    "keys_per_row": 0.5,
    "tile_pairs": 0.25,
    "flops": 0.25,
    "group": 0.25,
}
_OTHER_KIND = 2.0  # plain work against work that is not


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel is asked for in one direction, in a few figures; per batch element.

    Attributes:
        direction: "forward" or "backward".
        group: query heads per key head. qk_dim, v_dim: head dims.
        flops: of one launch, by exact area over all heads; the mean over launches.
        keys_per_row: mean keys that a row of a tile sees in it.
        tile_pairs: mean pairs of a tile.
        fill: allowed pairs over about those of the 128 × 128 blocks that each tile touches, laid
            from its own corner; 0 to 1.
        plain: every tile is a full or causal rectangle of all heads, and no two of a launch share
            rows or keys: what a fixed- or variable-length call takes.
        blocks: whether tiles have block matrices.
    """

    direction: str
    group: int
    qk_dim: int
    v_dim: int
    flops: float
    keys_per_row: float
    tile_pairs: float
    fill: float
    plain: bool
    blocks: bool

    def distance(self, other: "Work") -> float:
        """How unlike two works are; 0 for equal ones, infinite where they do not compare."""
        if (self.direction, self.blocks) != (other.direction, other.blocks):
            return math.inf
        total = _OTHER_KIND * (self.plain != other.plain)
        for name, weight in _WEIGHTS.items():
            total += weight * abs(math.log2(getattr(self, name) / getattr(other, name)))
        return total


@dataclass(frozen=True)
class Row:
    """One measured case: on what, in which dtype, and TFLOP/s by kernel name."""

    architecture: str
    dtype: str
    work: Work
    tflops: Mapping[str, float]


def architecture_of(device: torch.device) -> str:
    """How the table names a device: "sm_90" for compute capability 9.0, else the device type.

    A host query; waits for nothing on the device.
    """
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class Table:
    """Measured rows, and the comparison of kernels by them."""

    rows: tuple[Row, ...] = ()

    def scores(self, architecture: str, dtype: torch.dtype, work: Work) -> dict[str, float]:
        """Logarithm of each kernel's expected speed over that of the fastest, by name.

        The weighted mean over the `NEAREST` cases of the same device and kind of dtype. Kernels
        that none of them measured are not named; {} where no case is near.
        """
        near = [
            (row.work.distance(work), index, row)
            for index, row in enumerate(self.rows)
            if row.architecture == architecture and _kind(row.dtype) == _kind(dtype)
        ]
        near = sorted(entry for entry in near if entry[0] <= FAR)[:NEAREST]
        names = sorted({name for _, _, row in near for name in row.tflops})
        weights = [(distance + 0.1) ** -2 for distance, _, _ in near]
        scores = {}
        for name in names:
            parts = (
                weight * _relative(row.tflops, name)
                for weight, (_, _, row) in zip(weights, near, strict=True)
            )
            scores[name] = sum(parts) / sum(weights)
        return scores

    def merged(self, new: Iterable[Row]) -> "Table":
        """This table with new figures, which replace those of the same case and kernel."""
        table = {_case(row): row for row in self.rows}
        for row in new:
            known = table.get(_case(row))
            figures = {**(known.tflops if known else {}), **row.tflops}
            table[_case(row)] = Row(row.architecture, row.dtype, row.work, figures)
        return Table(tuple(sorted(table.values(), key=lambda row: repr(_case(row)))))

    def to_json(self) -> str:
        """The table as a file's text: one line per case."""
        lines = [
            json.dumps([row.architecture, row.dtype, *asdict(row.work).values(), dict(row.tflops)])
            for row in self.rows
        ]
        body = ",\n".join(f"  {line}" for line in lines)
        rows = f"[\n{body}\n ]" if lines else "[]"
        return f'{{\n "columns": {json.dumps(_COLUMNS)},\n "rows": {rows}\n}}\n'

    @staticmethod
    def from_json(text: str, name: str = "table") -> "Table":
        """Reads `to_json`. Raises UserError for another text."""
        try:
            data = json.loads(text)
            if data["columns"] != _COLUMNS:
                raise ValueError(f"columns are {data['columns']}")
            return Table(tuple(_row(values) for values in data["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                name, f"is not a table of measured kernels: {error}", "write it again"
            ) from None


_COLUMNS = ["architecture", "dtype", *(field.name for field in fields(Work)), "tflops"]


def _row(values: list[Any]) -> Row:
    named = dict(zip(_COLUMNS, values, strict=True))
    own = {name: named.pop(name) for name in ("architecture", "dtype", "tflops")}
    return Row(own["architecture"], own["dtype"], Work(**named), own["tflops"])


def _case(row: Row) -> tuple[Any, ...]:
    return (row.architecture, row.dtype, *asdict(row.work).values())


def _kind(dtype: torch.dtype | str) -> str:
    """Half-precision dtypes run alike."""
    name = str(dtype).removeprefix("torch.")
    return "half" if name in ("bfloat16", "float16") else name


def _relative(tflops: Mapping[str, float], name: str) -> float:
    if name not in tflops:
        return MISSING
    return math.log(tflops[name] / max(tflops.values()))


@cache
def shipped_table() -> Table:
    """The table of the package."""
    return Table.from_json(SHIPPED.read_text(encoding="utf-8"), SHIPPED.name)
