"""Turns a tile table into the op calls of the CPU flash kernel: few, large and batched."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ringattn.kernels.cpu_cells import CELL_ROWS, Cell
from ringattn.kernels.lattice import LatticeTile, lattice_tiles


@dataclass(frozen=True)
class Call:
    """`count` equal problems, batched. Coordinates are buffer rows.

    Problem c: query rows q0 + c * q_stride + step * [0, rows), key rows likewise, query heads
    [h0, h1). Row a of a problem attends keys lo <= b - a <= hi, or all where they are None.
    """

    h0: int
    h1: int
    step: int
    count: int
    q0: int
    q_stride: int
    rows: int
    k0: int
    k_stride: int
    keys: int
    lo: int | None
    hi: int | None
    causal: bool
    """Row a of a problem attends keys b <= a only; rows == keys."""
    first: bool
    """No earlier call of the list touches these query rows and heads."""

    @property
    def mask(self) -> torch.Tensor | None:
        """The additive mask (rows, keys), float32, 0 or -inf; None where all is allowed.

        Made anew each time: plans are many and long-lived, and making it costs little beside the
        call that uses it.
        """
        if self.lo is None or self.hi is None:
            return None
        distance = torch.arange(self.keys) - torch.arange(self.rows).unsqueeze(-1)
        outside = (distance < self.lo) | (distance > self.hi)
        return torch.zeros(self.rows, self.keys).masked_fill_(outside, float("-inf"))

    @property
    def keys_overlap(self) -> bool:
        """Whether two problems of the batch share key rows."""
        return self.count > 1 and self.k_stride < self.keys * self.step

    def touches(self, heads: slice) -> bool:
        """Whether the call has query heads among `heads`."""
        return max(self.h0, heads.start) < min(self.h1, heads.stop)

    def window(self, heads: slice) -> "Call":
        """The call's part in query heads `heads`, with heads counted from `heads.start`."""
        h0, h1 = max(self.h0, heads.start), min(self.h1, heads.stop)
        return replace(self, h0=h0 - heads.start, h1=h1 - heads.start)


# h0 h1 step rows keys lo hi causal
_Shape = tuple[int, int, int, int, int, int | None, int | None, bool]


def build_calls(
    tiles: np.ndarray, cells: Callable[[LatticeTile], Iterable[Cell]]
) -> tuple[Call, ...]:
    """The calls that together compute a `TILE` table, each pair once. `cells` cuts a tile."""
    blocks: dict[tuple[_Shape, int], list[tuple[int, int]]] = defaultdict(list)
    for tile in lattice_tiles(tiles):
        for c in cells(tile):
            shape = (tile.h0, tile.h1, tile.step, c.rows, c.keys, c.lo, c.hi, c.causal)
            q0, k0 = tile.q0 + c.q0 * tile.step, tile.k0 + c.k0 * tile.step
            blocks[shape, k0 - q0].append((q0, k0))
    calls = [
        _call(shape, run)
        for (shape, _), origins in blocks.items()
        for run in _runs(sorted(origins), rows=shape[3], step=shape[2])
    ]
    calls.sort(key=lambda call: -call.count * call.rows)
    return tuple(_mark_first(calls))


def _runs(origins: list[tuple[int, int]], rows: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Cuts sorted (q0, k0) into runs of constant strides whose query rows do not overlap.

    A run ends at `CELL_ROWS` query rows.
    """
    longest = max(1, CELL_ROWS // rows)
    start = 0
    while start < len(origins):
        stop, stride = start + 1, None
        while stop < min(len(origins), start + longest):
            q_stride, k_stride = (b - a for a, b in zip(*origins[stop - 1 : stop + 1], strict=True))
            if q_stride < rows * step or k_stride < 0 or stride not in (None, (q_stride, k_stride)):
                break
            stop, stride = stop + 1, (q_stride, k_stride)
        yield origins[start:stop]
        start = stop


def _call(shape: _Shape, run: list[tuple[int, int]]) -> Call:
    h0, h1, step, rows, keys, lo, hi, causal = shape
    (q0, k0), (q_next, k_next) = run[0], run[min(1, len(run) - 1)]
    return Call(
        h0=h0,
        h1=h1,
        step=step,
        count=len(run),
        q0=q0,
        q_stride=q_next - q0,
        rows=rows,
        k0=k0,
        k_stride=k_next - k0,
        keys=keys,
        lo=lo,
        hi=hi,
        causal=causal,
        first=False,
    )


def _mark_first(calls: list[Call]) -> Iterator[Call]:
    edges = sorted({h for call in calls for h in (call.h0, call.h1)})
    end = max((c.q0 + (c.count - 1) * c.q_stride + c.rows * c.step for c in calls), default=0)
    touched = np.zeros((len(edges), end), dtype=bool)
    for call in calls:
        heads = slice(edges.index(call.h0), edges.index(call.h1))
        starts = call.q0 + call.q_stride * np.arange(call.count)
        rows = (starts[:, None] + call.step * np.arange(call.rows)).ravel()
        yield replace(call, first=not touched[heads, rows].any())
        touched[heads, rows] = True
