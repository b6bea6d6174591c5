"""Bands cut for the CPU flash op: each pair exactly once, and no row left without a key."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest

from ringattn.kernels import cpu_cells
from ringattn.kernels.cpu_calls import Call, build_calls
from ringattn.kernels.cpu_cells import Cell, key_strip_cells, row_strip_cells
from ringattn.kernels.lattice import LatticeTile, lattice_tiles
from tests.kernels.problems import OPEN, dense_mask, random_tiles, tile_table

CUTS: dict[str, Callable[[LatticeTile], Iterable[Cell]]] = {
    "rows": partial(row_strip_cells, strip=24),
    "keys": partial(key_strip_cells, strip=24, causal=False),
    "keys, causal cells": partial(key_strip_cells, strip=24, causal=True),
}
TILES = {
    "causal": (0, 1, 0, 700, 0, 700, -OPEN, 0, 1),
    "upper": (0, 1, 0, 500, 0, 500, 0, OPEN, 1),
    "wide window": (0, 1, 0, 900, 0, 900, -310, 0, 1),
    "wide two-sided window": (0, 1, 0, 900, 0, 800, -210, 170, 1),
    "narrow window": (0, 1, 0, 900, 0, 900, -70, 0, 1),
    "thin window": (0, 1, 0, 300, 0, 300, -2, 1, 1),
    "single diagonal": (0, 1, 0, 300, 0, 300, 0, 0, 1),
    "causal with a prefix": (0, 1, 0, 300, 0, 900, -OPEN, 600, 1),
    "rectangle": (0, 1, 0, 700, 0, 130, -OPEN, OPEN, 1),
    "strided": (0, 1, 1, 700, 0, 700, -301, 17, 3),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few hundred rows go through every branch."""
    for name, size in (("BLOCK", 64), ("CAUSAL_BLOCK", 128), ("CELL_ROWS", 96), ("ROUND", 4)):
        monkeypatch.setattr(cpu_cells, name, size)


def _count(calls: Iterable[Call], heads: int, rows: int, keys: int) -> np.ndarray:
    count = np.zeros((heads, rows, keys), dtype=np.int64)
    for call in calls:
        for c in range(call.count):
            i = call.q0 + c * call.q_stride + call.step * np.arange(call.rows)
            j = call.k0 + c * call.k_stride + call.step * np.arange(call.keys)
            allowed = np.ones((call.rows, call.keys), dtype=np.int64)
            if call.mask is not None:
                allowed = (call.mask.numpy() == 0).astype(np.int64)
            if call.causal:
                assert call.mask is None
                allowed = np.tri(call.rows, call.keys, dtype=np.int64)
            count[np.ix_(np.arange(call.h0, call.h1), i, j)] += allowed
    return count


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", TILES)
def test_calls_cover_each_pair_once(name: str, cut: str) -> None:
    tiles = tile_table(TILES[name])
    calls = build_calls(tiles, CUTS[cut])
    np.testing.assert_array_equal(
        _count(calls, 1, 900, 900), dense_mask(tiles, 1, 900, 900).numpy()
    )


@pytest.mark.parametrize("cut", CUTS)
def test_calls_cover_random_tiles(cut: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(25):
        tiles = random_tiles(random, 3, 190, 240, steps=(1, 1, 2, 3))
        calls = build_calls(tiles, CUTS[cut])
        np.testing.assert_array_equal(
            _count(calls, 3, 190, 240), dense_mask(tiles, 3, 190, 240).numpy()
        )


def test_row_strips_leave_no_row_without_a_key(seed: int) -> None:
    """The op reports lse 0 for such a row, which a merge would take for a weight."""
    random = np.random.default_rng(seed)
    tables = [random_tiles(random, 2, 190, 240, steps=(1, 2)) for _ in range(25)]
    tables += [tile_table(row) for row in TILES.values()]
    for tile in (t for table in tables for t in lattice_tiles(table)):
        for cell in row_strip_cells(tile, strip=24):
            if cell.lo is not None and cell.hi is not None:
                rows = np.arange(cell.rows)
                first = np.maximum(0, rows + cell.lo)
                assert (first <= np.minimum(cell.keys - 1, rows + cell.hi)).all(), (tile, cell)


def test_causal_cells_are_used_where_asked() -> None:
    tiles = tile_table(TILES["causal"])
    assert any(call.causal for call in build_calls(tiles, CUTS["keys, causal cells"]))
    assert not any(call.causal for call in build_calls(tiles, CUTS["keys"]))


def test_equal_documents_share_a_call() -> None:
    tiles = tile_table(*[(0, 2, s, s + 20, s, s + 20, -OPEN, 0, 1) for s in range(0, 80, 20)])
    calls = build_calls(tiles, CUTS["rows"])
    assert [call.count for call in calls] == [4]
    assert calls[0].first


def test_only_the_first_call_on_a_row_is_marked_first() -> None:
    tiles = tile_table(
        (0, 2, 0, 40, 0, 40, -OPEN, OPEN, 1),
        (0, 2, 20, 60, 40, 80, -OPEN, OPEN, 1),
        (2, 3, 0, 30, 0, 40, -OPEN, OPEN, 1),
    )
    first = {(call.h0, call.q0): call.first for call in build_calls(tiles, CUTS["rows"])}
    assert sorted(first.values()) == [False, True, True]
    assert first[2, 0]


@pytest.mark.parametrize("cut", CUTS)
def test_bounds_that_exclude_nothing_cut_nothing(cut: str) -> None:
    """Tight bounds of a full band reach both corners; of a causal one, the lower left corner."""
    for tight, loose in (((-299, 299), (-OPEN, OPEN)), ((-299, 0), (-OPEN, 0))):
        calls = [
            build_calls(tile_table((0, 1, 10, 310, 10, 310, *bounds, 1)), CUTS[cut])
            for bounds in (tight, loose)
        ]
        assert calls[0] == calls[1]
