"""Bands: the one representation of a mask, closed under cropping and translation.

A band lets query i attend key j iff i in range(q0, q1, step), j in range(k0, k1, step) and
lo <= j - i <= hi. Coordinates are int64; +-OPEN stands for "no bound". All functions here take
and return NumPy arrays of dtype `BAND` and work on whole tables at once.
"""

import math

import numpy as np

from ringattn.errors import UserError

OPEN = 1 << 40
Column = int | np.ndarray  # a table column, or one value for all rows
BAND_FIELDS = ("q0", "q1", "k0", "k1", "lo", "hi", "step")
BAND = np.dtype([(name, np.int64) for name in BAND_FIELDS])


def integer_rows(rows, width: int, columns: str) -> np.ndarray:
    """Rows of `width` integers as an int64 table. Raises UserError for anything else."""
    try:
        values = np.asarray(rows)
    except ValueError:  # rows of different lengths
        values = np.empty(0, dtype=object)
    if values.size == 0 and values.dtype != object:
        return np.empty((0, width), dtype=np.int64)
    if values.dtype.kind not in "iu" or values.ndim != 2 or values[0].size != width:
        raise UserError(
            f"rows={str(rows)[:60]}",
            f"must be rows of {width} integers {columns}",
            "pass such rows",
        )
    return values.astype(np.int64)


def make_bands(rows) -> np.ndarray:
    """Builds a band table from an (n, 7) sequence of (q0, q1, k0, k1, lo, hi, step)."""
    values = integer_rows(rows, 7, "(q0, q1, k0, k1, lo, hi, step)")
    bands = np.empty(len(values), dtype=BAND)
    for column, name in enumerate(BAND_FIELDS):
        bands[name] = values[:, column]
    return bands


def band_columns(
    q0: Column,
    q1: Column,
    k0: Column,
    k1: Column,
    lo: Column = -OPEN,
    hi: Column = OPEN,
    step: Column = 1,
) -> np.ndarray:
    """Builds a band table from columns, each a scalar or an array; scalars are broadcast."""
    columns = np.broadcast_arrays(
        *(np.asarray(c, dtype=np.int64) for c in (q0, q1, k0, k1, lo, hi, step))
    )
    bands = np.empty(columns[0].size, dtype=BAND)
    for name, column in zip(BAND_FIELDS, columns, strict=True):
        bands[name] = column.ravel()
    return bands


def ceil_div(a, b):
    """Ceiling of a / b for integer arrays, exact for negative a."""
    return -((-a) // b)


def _lattice(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and diagonal bounds in lattice units: a < na, b < nb, lo <= b - a <= hi."""
    step = bands["step"]
    na = np.maximum(ceil_div(bands["q1"] - bands["q0"], step), 0)
    nb = np.maximum(ceil_div(bands["k1"] - bands["k0"], step), 0)
    shift = bands["k0"] - bands["q0"]
    lo = np.clip(ceil_div(bands["lo"] - shift, step), -na, nb)
    hi = np.clip((bands["hi"] - shift) // step, -na - 1, nb)
    return na, nb, lo, hi


def area(bands: np.ndarray) -> np.ndarray:
    """Allowed (query, key) pairs of each band, exact, in closed form."""
    na, nb, lo, hi = _lattice(bands)

    def below(m):
        # Sum over t = 1..m of min(t, nb): pairs in the first m diagonals' worth of rows.
        inside = np.clip(m, 0, nb)
        return inside * (inside + 1) // 2 + np.maximum(m - nb, 0) * nb

    def up_to(d):
        return below(na + d) - below(d)

    return np.where((na > 0) & (nb > 0) & (lo <= hi), up_to(hi) - up_to(lo - 1), 0)


def tighten(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shrinks each band to the rows and columns that hold a pair, and drops empty bands.

    Returns:
        The tight bands (q1, k1 one past the last used row, lo and hi finite) and the indices
        of the input bands they came from.
    """
    na, nb, lo, hi = _lattice(bands)
    a0 = np.maximum(0, -hi)
    a1 = np.minimum(na, nb - lo)
    b0 = np.maximum(0, a0 + lo)
    b1 = np.minimum(nb, a1 + hi)
    keep = np.flatnonzero((a0 < a1) & (b0 < b1) & (lo <= hi))
    a0, a1, b0, b1 = a0[keep], a1[keep], b0[keep], b1[keep]
    lo, hi = np.maximum(lo[keep], b0 - a1 + 1), np.minimum(hi[keep], b1 - 1 - a0)
    old, out = bands[keep], np.empty(len(keep), dtype=BAND)
    step = old["step"]
    shift = old["k0"] - old["q0"]
    out["q0"], out["q1"] = old["q0"] + a0 * step, old["q0"] + (a1 - 1) * step + 1
    out["k0"], out["k1"] = old["k0"] + b0 * step, old["k0"] + (b1 - 1) * step + 1
    out["lo"], out["hi"], out["step"] = lo * step + shift, hi * step + shift, step
    return out, keep


def dense(bands: np.ndarray, seq_len: int) -> np.ndarray:
    """The bool (seq_len, seq_len) matrix of allowed pairs. For tests and pictures."""
    allowed = np.zeros((seq_len, seq_len), dtype=bool)
    for band in bands:
        q = np.arange(band["q0"], min(band["q1"], seq_len), band["step"])
        k = np.arange(band["k0"], min(band["k1"], seq_len), band["step"])
        distance = k[None, :] - q[:, None]
        allowed[np.ix_(q, k)] |= (band["lo"] <= distance) & (distance <= band["hi"])
    return allowed


def expand_ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists every index of the half-open ranges [first, last): (which range, index)."""
    counts = np.maximum(last - first, 0)
    which = np.repeat(np.arange(len(first)), counts)
    starts = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - starts[which] + first[which]


def _common_lattice(a0: int, a_step: int, b0: int, b_step: int) -> tuple[int, int] | None:
    """Smallest x >= max(a0, b0) on both lattices and the joint step, or None."""
    g = math.gcd(a_step, b_step)
    if (b0 - a0) % g:
        return None
    joint = a_step // g * b_step
    inverse = pow(a_step // g, -1, b_step // g) if b_step // g > 1 else 0
    x = a0 + a_step * ((b0 - a0) // g * inverse % (b_step // g))
    low = max(a0, b0)
    return x + ceil_div(low - x, joint) * joint, joint


def _meet(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two bands share a pair."""
    q = _common_lattice(int(a["q0"]), int(a["step"]), int(b["q0"]), int(b["step"]))
    k = _common_lattice(int(a["k0"]), int(a["step"]), int(b["k0"]), int(b["step"]))
    if q is None or k is None:
        return False
    both = make_bands(
        [
            (
                q[0], min(a["q1"], b["q1"]), k[0], min(a["k1"], b["k1"]),
                max(a["lo"], b["lo"]), min(a["hi"], b["hi"]), q[1],
            )
        ]
    )  # fmt: skip
    return bool(area(both)[0] > 0)


def find_overlap(bands: np.ndarray) -> tuple[int, int] | None:
    """The indices of two bands that share a pair, or None when all are disjoint."""
    order = np.argsort(bands["q0"], kind="stable")
    ordered = bands[order]
    last = np.searchsorted(ordered["q0"], ordered["q1"], side="left")
    first, second = expand_ranges(np.arange(1, len(bands) + 1), last)
    a, b = ordered[first], ordered[second]
    close = (a["k0"] < b["k1"]) & (b["k0"] < a["k1"]) & (a["lo"] <= b["hi"]) & (b["lo"] <= a["hi"])
    for i, j in zip(first[close], second[close], strict=True):
        if _meet(ordered[i], ordered[j]):
            return int(order[i]), int(order[j])
    return None
