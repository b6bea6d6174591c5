"""Tiles as windowed sequences: every pair once, windows as the ops define them."""

from itertools import pairwise

import numpy as np
import pytest

from ringattn.kernels.band_windows import OPEN_WINDOW, window_calls
from tests.kernels.problems import dense_mask, random_tiles, tile_table
from tests.kernels.test_adapters import SHAPES


def _pairs(tiles: np.ndarray, heads: int, rows: int, keys: int) -> np.ndarray:
    """How often the calls of a tile list compute each pair, from the windows' definition."""
    count = np.zeros((heads, rows, keys), dtype=np.int64)
    for call in window_calls(tiles):
        i, j = np.arange(rows)[call.rows], np.arange(keys)[call.keys]
        q_starts, k_starts = call.starts
        for (a0, a1), (b0, b1) in zip(pairwise(q_starts), pairwise(k_starts), strict=True):
            distance = np.arange(b1 - b0) - np.arange(a1 - a0)[:, None] - (b1 - b0) + (a1 - a0)
            seen = np.ones_like(distance, dtype=bool)
            if call.left != OPEN_WINDOW:
                seen &= distance >= -call.left
            if call.right != OPEN_WINDOW:
                seen &= distance <= call.right
            count[call.h0 : call.h1, i[a0:a1, None], j[None, b0:b1]] += seen
    return count


@pytest.mark.parametrize("name", SHAPES)
def test_calls_compute_each_pair_once(name: str) -> None:
    tiles = tile_table(*SHAPES[name])
    rows, keys = int(tiles["q1"].max()), int(tiles["k1"].max())
    assert np.array_equal(_pairs(tiles, 4, rows, keys), dense_mask(tiles, 4, rows, keys).numpy())


def test_calls_of_random_tiles_compute_each_pair_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        rows, keys = (int(x) for x in random.integers(1, 70, 2))
        tiles = random_tiles(random, 3, rows, keys, steps=(1, 2, 3))
        random.shuffle(tiles)
        expected = dense_mask(tiles, 3, rows, keys).numpy()
        assert np.array_equal(_pairs(tiles, 3, rows, keys), expected)


def test_windows_of_tight_tiles_are_never_negative(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        rows, keys = (int(x) for x in random.integers(1, 70, 2))
        for call in window_calls(random_tiles(random, 3, rows, keys, steps=(1, 2))):
            assert min(call.left, call.right) >= OPEN_WINDOW
