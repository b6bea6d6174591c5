"""The tiles of a mask over a layout, cut at random."""

import numpy as np

from ringattn.bands import ceil_div, tighten
from ringattn.methods.common import Problem, tasks_of
from ringattn.schedule import bands_of, set_bands

CUTS = 24  # at most so many tiles are cut in two


def random_tiles(problem: Problem, rng: np.random.Generator) -> list[tuple[np.ndarray, int, int]]:
    """Tiles in shard rows, in random order: (task, owner of queries, owner of keys)."""
    tasks = tasks_of(problem, problem.pieces, 0)
    tiles = list(zip(np.split(tasks, len(tasks)), problem.q_rank, problem.k_rank, strict=True))
    for _ in range(int(rng.integers(CUTS + 1)) if tiles else 0):
        tile, q_owner, k_owner = tiles.pop(int(rng.integers(len(tiles))))
        tiles += [(part, q_owner, k_owner) for part in _cut(tile, rng)]
    return [tiles[i] for i in rng.permutation(len(tiles))]


def _cut(tile: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """A tile in two, by queries, keys or heads; parts without a pair are left out."""
    low, high = tile.copy(), tile.copy()
    axis = ("q", "k", "h")[int(rng.integers(3))]
    step = 1 if axis == "h" else int(tile["stride"][0])
    count = int(ceil_div(tile[axis + "1"] - tile[axis + "0"], step)[0])
    low[axis + "1"] = high[axis + "0"] = tile[axis + "0"] + step * int(rng.integers(count + 1))
    high["head"] += high["h0"] - tile["h0"]
    parts = [part for part in (low, high) if part["h0"] < part["h1"]]
    if axis == "h":
        return parts
    tight = [tighten(bands_of(part))[0] for part in parts]
    parts = [part for part, bands in zip(parts, tight, strict=True) if len(bands)]
    for part, bands in zip(parts, (b for b in tight if len(b)), strict=True):
        set_bands(part, bands)
    return parts
