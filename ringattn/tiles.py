"""Tiles: the non-empty intersections of a mask with owned query and key ranges.

A segment maps global tokens start, start + step, ... < stop to rows offset, offset + 1, ... of a
buffer. `intersect` sees every band through every pair of query and key segments and returns tiles
in buffer rows. It serves layouts (shards are segments) and packed receive buffers alike.
"""

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import BAND, BAND_FIELDS, ceil_div, expand_ranges
from ringattn.errors import UserError

SEGMENT = np.dtype(
    [(name, np.int64) for name in ("start", "stop", "step", "group", "owner", "offset")]
)
PIECE = np.dtype(
    [(name, np.int64) for name in ("qseg", "kseg", "band")]
    + [(name, np.int64) for name in ("q0", "q1", "k0", "k1", "lo", "hi", "step", "area")]
    + [(name, np.int64) for name in ("q_token", "k_token", "pitch")]
)
MAX_TILES = 1 << 21
_GROUP = 1 << 41  # larger than any token id, so that (group, token) orders as one integer


def crop_queries(
    bands: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bands seen by the query rows of each range [start, stop), which band, which range;
    ranges sorted and disjoint."""
    first = np.searchsorted(stop, bands["q0"], side="right")
    last = np.searchsorted(start, bands["q1"], side="left")
    which, chunk = expand_ranges(first, last)
    part = bands[which]
    low = np.maximum(part["q0"], start[chunk])
    part["q0"] += ceil_div(low - part["q0"], part["step"]) * part["step"]
    part["q1"] = np.minimum(part["q1"], stop[chunk])
    return part, which, chunk


def cropped_bands(
    bands: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `crop_queries`, without which band."""
    part, _, chunk = crop_queries(bands, start, stop)
    return part, chunk


def cropped_area(bands: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Mask area of the query rows of each range [start, stop); ranges sorted and disjoint."""
    part, chunk = cropped_bands(bands, start, stop)
    total = np.zeros(len(start), dtype=np.int64)
    np.add.at(total, chunk, band_ops.area(part))
    return total


class _Index:
    """Segments sorted by (group, start) for interval queries; they may interleave (stripes)."""

    def __init__(self, segments: np.ndarray) -> None:
        key = segments["group"] * _GROUP
        self.order = np.argsort(key + segments["start"], kind="stable")
        key = key[self.order]
        self.starts = key + segments["start"][self.order]
        self.reach = np.maximum.accumulate(key + segments["stop"][self.order]) if len(key) else key

    def candidates(self, group, low, high) -> tuple[np.ndarray, np.ndarray]:
        """(query index, segment index) pairs that may overlap [low, high) within the group."""
        first = np.searchsorted(self.reach, group * _GROUP + low, side="right")
        last = np.searchsorted(self.starts, group * _GROUP + high, side="left")
        which, position = expand_ranges(first, np.where(low < high, last, first))
        return which, self.order[position]


def intersect(bands: np.ndarray, q_segments: np.ndarray, k_segments: np.ndarray) -> np.ndarray:
    """All tiles of the bands over pairs of a query and a key segment of the same group.

    A query segment of group g meets key segments of group g only. All segments share one step.
    Raises UserError beyond `MAX_TILES` candidates.

    Returns:
        A table of dtype `PIECE`: segment and band indices, tile in buffer rows, area, and where
        its rows lie: buffer row r of the segments holds token q_token (k_token) + pitch * r.
        Tiles are tight and ordered by query segment, key segment, band.
    """
    band, qs = (
        _Index(q_segments).candidates(0, bands["q0"], bands["q1"])
        if not (len(q_segments) and q_segments["group"].any())
        else _over_groups(bands, q_segments)
    )
    b, q = bands[band], q_segments[qs]
    q0, q1 = np.maximum(b["q0"], q["start"]), np.minimum(b["q1"], q["stop"])
    k0 = np.maximum(b["k0"], q0 + b["lo"])
    k1 = np.minimum(b["k1"], q1 + b["hi"])
    keep = (q0 < q1) & (k0 < k1)
    band, qs, k0, k1 = band[keep], qs[keep], k0[keep], k1[keep]
    which, ks = _Index(k_segments).candidates(q_segments["group"][qs], k0, k1)
    if len(which) > MAX_TILES:
        raise UserError(
            f"a plan of {len(which):,} tiles",
            f"at most {MAX_TILES:,} are planned: every range of queries meets every one of keys",
            "use a layout of fewer, longer ranges, such as zigzag, or larger chunks",
        )
    band, qs = band[which], qs[which]
    tile, keep = _see(bands[band], q_segments[qs], k_segments[ks])
    out = np.empty(len(tile), dtype=PIECE)
    out["qseg"], out["kseg"], out["band"] = qs[keep], ks[keep], band[keep]
    for name in BAND_FIELDS:
        out[name] = tile[name]
    out["area"] = band_ops.area(tile)
    for axis, segments in (("q", q_segments[out["qseg"]]), ("k", k_segments[out["kseg"]])):
        out[axis + "_token"] = segments["start"] - segments["offset"] * segments["step"]
        out["pitch"] = segments["step"]
    return out[np.lexsort((out["band"], out["kseg"], out["qseg"]))]


def _over_groups(bands: np.ndarray, q_segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(band, query segment) candidates whatever the segments' groups."""
    flat = q_segments.copy()
    flat["group"] = 0
    return _Index(flat).candidates(0, bands["q0"], bands["q1"])


def _see(bands: np.ndarray, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each band through its query and key segment, in buffer rows, tightened.

    With segment step s and band step d: rows x with start + s*x on the band's lattice form a
    lattice of step d / gcd(d, s), or none exists. Distances divide by s.
    """
    s, d = q["step"], bands["step"]
    g = np.gcd(d, s)
    shift = k["start"] - q["start"]
    tile = np.empty(len(bands), dtype=BAND)
    tile["step"] = d // g
    tile["lo"] = ceil_div(bands["lo"] - shift, s)
    tile["hi"] = (bands["hi"] - shift) // s
    empty = np.zeros(len(bands), dtype=bool)
    for axis, segment in (("q", q), ("k", k)):
        origin = bands[axis + "0"] - segment["start"]
        empty |= origin % g != 0
        low = np.maximum(ceil_div(origin, s), 0)
        residue = _residue(origin // g, s // g, d // g)
        tile[axis + "0"] = low + (residue - low) % tile["step"]
        count = (segment["stop"] - segment["start"]) // s
        tile[axis + "1"] = np.minimum(ceil_div(bands[axis + "1"] - segment["start"], s), count)
    tile["q1"] = np.where(empty, tile["q0"], tile["q1"])
    tight, keep = band_ops.tighten(tile)
    for axis, segment in (("q", q), ("k", k)):
        tight[axis + "0"] += segment["offset"][keep]
        tight[axis + "1"] += segment["offset"][keep]
    offset = k["offset"][keep] - q["offset"][keep]
    tight["lo"] += offset
    tight["hi"] += offset
    return tight, keep


def _residue(origin: np.ndarray, step: np.ndarray, modulus: np.ndarray) -> np.ndarray:
    """x modulo `modulus` with step * x = origin (mod modulus); step and modulus are coprime."""
    inverse = np.ones_like(modulus)
    for value in (
        np.unique(np.stack([step, modulus], axis=1), axis=0) if (modulus > 1).any() else ()
    ):
        if value[1] > 1:
            hit = (step == value[0]) & (modulus == value[1])
            inverse[hit] = pow(int(value[0]) % int(value[1]), -1, int(value[1]))
    return origin % modulus * inverse % modulus
