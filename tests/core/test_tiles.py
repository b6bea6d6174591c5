"""Tiles of mask × layout: together the mask, disjoint, tight, with exact areas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Layout, Mask, layouts, masks
from ringattn.bands import make_bands
from ringattn.tiles import SEGMENT, cropped_area, intersect
from tests.core.cases import BAND_MASKS, LAYOUTS, mask_of
from tests.core.test_bands import bands

WORLDS = [1, 2, 3, 4, 7]


def _seen(mask: Mask, layout: Layout) -> np.ndarray:
    """How often each global pair is in a tile; checks that every tile is tight."""
    seen = np.zeros((mask.seq_len, mask.seq_len), dtype=int)
    owner = layout.ranges["owner"]
    for tile in intersect(mask.bands, layout.ranges, layout.ranges):
        i = np.arange(tile["q0"], tile["q1"], tile["step"])
        j = np.arange(tile["k0"], tile["k1"], tile["step"])
        distance = j[None, :] - i[:, None]
        allowed = (distance >= tile["lo"]) & (distance <= tile["hi"])
        assert allowed.any(axis=0).all()
        assert allowed.any(axis=1).all()
        assert allowed.sum() == tile["area"]
        q = layout.positions(int(owner[tile["qseg"]]))[i]
        k = layout.positions(int(owner[tile["kseg"]]))[j]
        seen[np.ix_(q, k)] += allowed
    return seen


@pytest.mark.parametrize("mask_name", BAND_MASKS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_tiles_are_the_mask(mask_name: str, layout_name: str) -> None:
    mask = mask_of(mask_name)
    for world in WORLDS:
        layout = LAYOUTS[layout_name](mask, world)
        assert (_seen(mask, layout) == mask.dense()).all(), world


@settings(max_examples=60)
@given(bands(most=1), st.integers(1, 4), st.integers(1, 5))
def test_a_strided_band_through_any_stripes(rows: list, world: int, stride: int) -> None:
    """Steps d of the band and s of the layout meet in a lattice of step d / gcd(d, s)."""
    seq_len = 24
    ranges = [(r, seq_len, stride, r % world) for r in range(stride)]
    mask = masks.from_bands(seq_len, rows)
    assert (_seen(mask, layouts.from_ranges(seq_len, world, ranges)) == mask.dense()).all()


def test_fewer_tokens_than_ranks() -> None:
    for layout in (layouts.zigzag(3, 5), layouts.striped(3, 5), layouts.contiguous(3, 5)):
        assert (_seen(masks.causal(3), layout) == masks.causal(3).dense()).all()


def test_a_mask_without_pairs_has_no_tiles() -> None:
    layout = layouts.zigzag(16, 2)
    assert not len(intersect(masks.from_bands(16, []).bands, layout.ranges, layout.ranges))


def test_query_segments_meet_only_key_segments_of_their_group() -> None:
    """Packed buffers: two groups hold different keys at the same rows."""

    def segment(start: int, stop: int, group: int, offset: int) -> tuple[int, ...]:
        return start, stop, 1, group, 0, offset

    queries = np.array([segment(0, 4, 0, 0), segment(4, 8, 1, 0)], dtype=SEGMENT)
    keys = np.array([segment(0, 2, 0, 0), segment(0, 3, 1, 0), segment(5, 8, 1, 3)], dtype=SEGMENT)
    pieces = intersect(masks.full(8).bands, queries, keys)
    pairs = [(p["qseg"], p["kseg"]) for p in pieces]
    assert pairs == [(0, 0), (1, 1), (1, 2)]
    assert pieces["area"].tolist() == [8, 12, 12]
    assert (pieces["k0"].tolist(), pieces["k1"].tolist()) == ([0, 0, 3], [2, 3, 6])


def test_tiles_through_striped_shards_stay_few() -> None:
    """Striping by single tokens does not multiply tiles: one per pair of ranks."""
    mask, layout = masks.causal(1 << 16), layouts.striped(1 << 16, 8)
    assert len(intersect(mask.bands, layout.ranges, layout.ranges)) == 64


@given(bands(most=3), st.lists(st.integers(0, 24), min_size=2, max_size=6, unique=True))
def test_the_area_of_query_ranges(rows: list, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    start, stop = np.array(cuts[:-1]), np.array(cuts[1:])
    expected = np.zeros(len(start), dtype=int)
    for row in rows:
        matrix = masks.from_bands(24, [row]).dense()
        expected += [int(matrix[a:b].sum()) for a, b in zip(start, stop, strict=True)]
    assert cropped_area(make_bands(rows), start, stop).tolist() == expected.tolist()
