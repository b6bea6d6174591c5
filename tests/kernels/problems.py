"""Random tile lists, and a kernel run beside the dense reference."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ringattn.kernels import (
    TILE,
    DenseAttention,
    Kernel,
    accumulator_dtype,
    dense_attention,
)

OPEN = 1 << 40
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Operands (B, rows, heads, dim) and the dense mask (Hq, Sq, Sk) of a tile list."""

    tiles: np.ndarray
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    allowed: torch.Tensor
    scale: float
    softcap: float | None = None

    def reference(self) -> DenseAttention:
        return dense_attention(
            self.q,
            self.k,
            self.v,
            self.allowed,
            self.dout,
            scale=self.scale,
            softcap=self.softcap,
        )


def tile_table(*rows: tuple[int, ...]) -> np.ndarray:
    """Rows h0 h1 q0 q1 k0 k1 lo hi step."""
    return np.array(list(rows), dtype=TILE)


def dense_mask(tiles: np.ndarray, heads: int, rows: int, keys: int) -> torch.Tensor:
    """bool (heads, rows, keys); asserts that no pair is in two tiles."""
    count = np.zeros((heads, rows, keys), dtype=np.int64)
    for h0, h1, q0, q1, k0, k1, lo, hi, step in tiles.tolist():
        distance = np.arange(k0, k1, step)[None] - np.arange(q0, q1, step)[:, None]
        count[h0:h1, q0:q1:step, k0:k1:step] += (distance >= lo) & (distance <= hi)
    assert count.max(initial=0) <= 1, "tiles overlap"
    return torch.from_numpy(count > 0)


def tight(h0: int, h1: int, rows: range, keys: range, lo: int, hi: int) -> np.ndarray:
    """A table of one tile, cropped to the rows and keys it uses, or of none."""
    i, j = np.array(rows)[:, None], np.array(keys)[None]
    used = (j - i >= lo) & (j - i <= hi)
    if not used.any():
        return tile_table()
    i, j = i[used.any(1), 0], j[0, used.any(0)]
    return tile_table((h0, h1, i[0], i[-1] + 1, j[0], j[-1] + 1, lo, hi, rows.step))


def random_tiles(
    random: np.random.Generator, heads: int, rows: int, keys: int, steps: tuple[int, ...]
) -> np.ndarray:
    """Disjoint bands: the buffers are cut into a few rectangles, each with its own band or none."""
    tables = [tile_table()]
    head_cuts = sorted({0, heads, int(random.integers(0, heads + 1))})
    for h0, h1 in pairwise(head_cuts):
        row_cuts = sorted({0, rows, *random.integers(0, rows + 1, 2).tolist()})
        key_cuts = sorted({0, keys, *random.integers(0, keys + 1, 1).tolist()})
        for q0, q1 in pairwise(row_cuts):
            for k0, k1 in pairwise(key_cuts):
                step = int(random.choice(steps))
                centre = k0 - q0 + int(random.integers(q0 - q1, k1 - k0))
                below, above = random.integers(0, rows // 3 + 1, 2).tolist()
                lo = -OPEN if random.random() < 0.5 else centre - below
                hi = OPEN if random.random() < 0.5 else centre + above
                if random.random() < 0.85:
                    qs, ks = range(q0, q1, step), range(k0, k1, step)
                    tables.append(tight(h0, h1, qs, ks, lo, hi))
    return np.concatenate(tables)


def problem(
    tiles: np.ndarray,
    generator: torch.Generator,
    *,
    rows: int,
    keys: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    softcap: float | None = None,
) -> Problem:
    """Normally distributed operands for a tile list."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Problem(
        tiles=tiles,
        q=draw(batch, rows, heads[0], head_dim[0]),
        k=draw(batch, keys, heads[1], head_dim[0]),
        v=draw(batch, keys, heads[1], head_dim[1]),
        dout=draw(batch, rows, heads[0], head_dim[1]),
        allowed=dense_mask(tiles, heads[0], rows, keys),
        scale=head_dim[0] ** -0.5,
        softcap=softcap,
    )


def run_kernel(kernel: Kernel, p: Problem, parts: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv with the tiles given in several launches, in accumulator dtype.

    The backward takes the launches in the opposite order, with the lse and delta of all of them.
    """
    dtype = accumulator_dtype(p.q.dtype)
    prepared = [kernel.prepare(part, p.q.device) for part in parts]
    out = torch.zeros_like(p.dout, dtype=dtype)
    lse = p.q.new_full(p.q.shape[:3], float("-inf"), dtype=dtype)
    for part in prepared:
        kernel.forward(p.q, p.k, p.v, part, out, lse, scale=p.scale, softcap=p.softcap)
    delta = (out * p.dout).sum(-1)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (p.q, p.k, p.v))
    for part in reversed(prepared):
        kernel.backward(
            p.dout,
            p.q,
            p.k,
            p.v,
            lse,
            delta,
            part,
            dq,
            dk,
            dv,
            scale=p.scale,
            softcap=p.softcap,
        )
    return dict(zip(NAMES, (out, lse, dq, dk, dv), strict=True))
