"""Bands of 1-, 2- and 3-D neighbourhood attention (NATTEN; arXiv 2504.16922, section 3).

On each axis, coordinate i of extent L with dilation d belongs to the group g = i mod d, where it
has index x = i // d among ceil((L - g) / d). Its window is an interval of indices of its group,
chosen by the leader of its stride group. A grid mask is the product over axes; in row-major order
every combination of outer coordinates contributes the innermost axis's bands, translated.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from ringattn.bands import BAND, OPEN, band_columns
from ringattn.errors import UserError

MAX_BANDS = 1 << 20


def neighborhood_bands(
    shape: Sequence[int], window, dilation, stride, causal, tile: Sequence[int] | None
) -> tuple[int, np.ndarray]:
    """Returns (S, band table). Arguments as in `ringattn.masks.neighborhood`."""
    extents = tuple(shape) if isinstance(shape, Sequence) else ()
    rank = len(extents)
    if not 1 <= rank <= 3 or not all(isinstance(n, int | np.integer) and n >= 1 for n in extents):
        raise UserError(
            f"shape={shape}", "must be 1 to 3 positive extents", "pass e.g. (8, 64, 64)"
        )
    windows, dilations = _per_axis("window", window, rank), _per_axis("dilation", dilation, rank)
    strides = _per_axis("stride", stride, rank)
    causals = tuple(bool(c) for c in _per_axis("causal", causal, rank))
    for n, w, d, s in zip(extents, windows, dilations, strides, strict=True):
        if min(w, d, s) < 1 or w * d > n:
            raise UserError(
                f"window={w}, dilation={d}, stride={s} on an axis of {n}",
                "must be positive with window * dilation <= extent",
                "shrink the window or the dilation",
            )
        if s > w:
            raise UserError(f"stride={s}", f"must not exceed the window {w}", "shrink the stride")
    seq_len = int(np.prod(extents))
    axes = list(zip(extents, windows, dilations, strides, causals, strict=True))
    if tile is not None:
        return seq_len, _tile_major(axes, tuple(int(t) for t in tile))
    return seq_len, _row_major(axes)


def axis_window(n: int, w: int, d: int, s: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and last key coordinate (inclusive, same dilation group) of each query coordinate."""
    i = np.arange(n, dtype=np.int64)
    group, x = i % d, i // d
    length = (n - group + d - 1) // d
    if causal:
        leader = np.minimum(x // s * s + s - 1, length - 1)
        first, last = np.maximum(leader - w + 1, 0), x
    else:
        leader = np.minimum(x // s * s + s // 2, length - 1)
        first = np.clip(leader - w // 2, 0, length - w)
        last = first + w - 1
    return first * d + group, last * d + group


def _per_axis(name: str, value, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or not all(isinstance(v, int | np.integer) for v in values):
        raise UserError(f"{name}={value!r}", f"must be one integer or {rank}", "give one per axis")
    return tuple(int(v) for v in values)


def _axis_bands(axis: tuple[int, int, int, int, bool]) -> np.ndarray:
    """Bands of one axis: runs of queries whose window edges are both fixed or both slide."""
    n, _, d, _, _ = axis
    first, last = axis_window(*axis)
    rows = []
    for g in range(d):
        q = np.arange(g, n, d)
        edges = np.stack([np.diff(first[q]), np.diff(last[q])], axis=1)
        # A run continues while each edge keeps doing the same: stay, or move with the query.
        kinds = np.where(edges == 0, 0, np.where(edges == d, 1, 2))
        a = 0
        while a < len(q):
            b = a + 1
            while b < len(q) and (kinds[b - 1] < 2).all() and (kinds[b - 1] == kinds[a]).all():
                b += 1
            slide_first, slide_last = (kinds[a] == 1) if b - a > 1 else (False, False)
            rows.append(
                (
                    q[a],
                    q[b - 1] + 1,
                    first[q[a]],
                    last[q[b - 1]] + 1,
                    first[q[a]] - q[a] if slide_first else -OPEN,
                    last[q[a]] - q[a] if slide_last else OPEN,
                    d,
                )
            )
            a = b
    return band_columns(*np.array(rows, dtype=np.int64).T)


def _check_count(count: int) -> None:
    if count > MAX_BANDS:
        raise UserError(
            f"neighbourhood of {count} bands",
            f"at most {MAX_BANDS} bands are built",
            "give tokens in tile-major order (tile=...) with strides in multiples of the tile",
        )


def _row_major(axes: list[tuple[int, int, int, int, bool]]) -> np.ndarray:
    inner = _axis_bands(axes[-1])
    width = axes[-1][0]
    q_outer, k_outer = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    count = len(inner)
    for axis in axes[:-1]:
        first, last = axis_window(*axis)
        count *= int(((last - first) // axis[2] + 1).sum())
    _check_count(count)
    for n, w, d, s, causal in axes[:-1]:
        first, last = axis_window(n, w, d, s, causal)
        per_query = (last - first) // d + 1
        q = np.repeat(np.arange(n), per_query)
        k = np.concatenate([np.arange(a, b + 1, d) for a, b in zip(first, last, strict=True)])
        q_outer = (q_outer[:, None] * n + q).ravel()
        k_outer = (k_outer[:, None] * n + k).ravel()
    q_shift, k_shift = (q_outer * width)[:, None], (k_outer * width)[:, None]
    open_lo, open_hi = inner["lo"] <= -OPEN, inner["hi"] >= OPEN
    return band_columns(
        q_shift + inner["q0"],
        q_shift + inner["q1"],
        k_shift + inner["k0"],
        k_shift + inner["k1"],
        np.where(open_lo, -OPEN, inner["lo"] + k_shift - q_shift),
        np.where(open_hi, OPEN, inner["hi"] + k_shift - q_shift),
        inner["step"],
    )


def _tile_major(axes: list[tuple[int, int, int, int, bool]], tile: tuple[int, ...]) -> np.ndarray:
    """Tokens tile by tile: all queries of a tile share one window, a product of intervals."""
    fits = len(tile) == len(axes) and all(
        t >= 1 and n % t == 0 and s % t == 0 and d == 1 and not c
        for t, (n, _, d, s, c) in zip(tile, axes, strict=False)
    )
    if not fits:
        raise UserError(
            f"tile={tile}",
            "must divide the grid and every stride, without dilation or a causal axis",
            "choose strides that are multiples of the tile",
        )
    grid = [n // t for t, (n, *_) in zip(tile, axes, strict=True)]
    volume = int(np.prod(tile))
    windows = [axis_window(*axis) for axis in axes]
    tables: list[np.ndarray] = []
    count = 0
    for index, where in enumerate(itertools.product(*(range(g) for g in grid))):
        spans = [
            (int(f[p * t]), int(e[p * t]) + 1)
            for (f, e), p, t in zip(windows, where, tile, strict=True)
        ]
        keys = np.sort(_tile_tokens(spans, tile, grid))
        cuts = np.flatnonzero(np.diff(keys) > 1) + 1
        k0 = keys[np.concatenate([[0], cuts])]
        k1 = keys[np.concatenate([cuts - 1, [len(keys) - 1]])] + 1
        count += len(k0)
        _check_count(count)
        tables.append(band_columns(index * volume, (index + 1) * volume, k0, k1))
    return np.concatenate(tables) if tables else np.empty(0, dtype=BAND)


def _tile_tokens(
    spans: list[tuple[int, int]], tile: tuple[int, ...], grid: list[int]
) -> np.ndarray:
    """Tile-major ids of the tokens inside a box of grid coordinates."""
    coordinates = np.meshgrid(*(np.arange(a, b) for a, b in spans), indexing="ij")
    outer = np.zeros_like(coordinates[0])
    inner = np.zeros_like(coordinates[0])
    for c, t, g in zip(coordinates, tile, grid, strict=True):
        outer = outer * g + c // t
        inner = inner * t + c % t
    return (outer * int(np.prod(tile)) + inner).ravel()
