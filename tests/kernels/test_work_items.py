"""How the band kernel cuts tiles: every pair visited once, no row in two programs of a launch."""

from collections.abc import Iterator

import numpy as np
import pytest

from ringattn.kernels.work_items import Items, by_step, column_visits, step_items, transposed
from ringattn.kernels.work_lists import head_groups, ordered_works, single_heads, written_out
from tests.kernels.problems import OPEN, dense_mask, random_tiles, tile_table

HEADS, ROWS, KEYS = 4, 150, 170


def build_items(tiles: np.ndarray, row_block: int, column_block: int) -> list[Items]:
    """The items of every launch of a tile list."""
    return [step_items(part, row_block, column_block) for part in by_step(tiles)]


def _visits(
    items: Items, row_block: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """(rows, columns, allowed, item) of every ref of every item, as the device sees them."""
    for number, (row0, count, begin, end) in enumerate(items.items.tolist()):
        assert 0 < count <= row_block
        rows = row0 + items.step * np.arange(count)
        for ref in items.refs[begin:end]:
            first, last = column_visits(ref[None], np.array([row0]), np.array([count]), items.step)
            columns = np.arange(first[0], last[0], items.step)
            r0, r1, c0, c1, lo, hi = ref.tolist()
            assert not len(columns) or (columns[0] >= c0 and columns[-1] < c1)
            distance = columns[None] - rows[:, None]
            inside = (distance >= lo) & (distance <= hi) & ((rows >= r0) & (rows < r1))[:, None]
            yield rows, columns, inside, number


def _counted(launches: list[Items], row_block: int, shape: tuple[int, int, int]) -> np.ndarray:
    count = np.zeros(shape, dtype=np.int64)
    for items in launches:
        for rows, columns, inside, number in _visits(items, row_block):
            h0, h1 = items.heads[number]
            count[h0:h1, rows[:, None], columns[None]] += inside
    return count


@pytest.mark.parametrize("steps", [(1,), (1, 2), (3,)], ids=str)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 8), (64, 128)], ids=str)
def test_every_pair_is_visited_once(
    seed: int, steps: tuple[int, ...], blocks: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    for _ in range(6):
        tiles = random_tiles(random, HEADS, ROWS, KEYS, steps)
        dense = dense_mask(tiles, HEADS, ROWS, KEYS).numpy()
        count = _counted(build_items(tiles, *blocks), blocks[0], dense.shape)
        np.testing.assert_array_equal(count, dense)
        turned = _counted(build_items(transposed(tiles), *blocks), blocks[0], (HEADS, KEYS, ROWS))
        np.testing.assert_array_equal(turned, dense.transpose(0, 2, 1))


@pytest.mark.parametrize("steps", [(1,), (1, 2, 3)], ids=str)
def test_programs_of_a_launch_share_no_row(seed: int, steps: tuple[int, ...]) -> None:
    random = np.random.default_rng(seed)
    for _ in range(6):
        for items in build_items(random_tiles(random, HEADS, ROWS, KEYS, steps), 16, 16):
            taken = np.zeros((HEADS, ROWS), dtype=np.int64)
            for (row0, count, _, _), (h0, h1) in zip(items.items, items.heads, strict=True):
                taken[h0:h1, row0 : row0 + count * items.step : items.step] += 1
            assert taken.max(initial=0) <= 1


def test_entries_are_the_refs_written_out(seed: int) -> None:
    """Every column of every ref lies in one entry, and an entry without a mask needs none."""
    random = np.random.default_rng(seed)
    for row_block, column_block in ((16, 16), (32, 8), (8, 32)):
        tiles = random_tiles(random, HEADS, ROWS, KEYS, (1, 2))
        for items in build_items(tiles, row_block, column_block):
            ranges, entries = written_out(items, row_block, column_block)
            held = {}
            for rows, columns, inside, number in _visits(items, row_block):
                pairs = held.setdefault(number, {})
                for x, y in zip(*np.nonzero(inside), strict=True):
                    pairs[int(rows[x]), int(columns[y])] = 1
            for number, (begin, end) in enumerate(ranges.tolist()):
                row0, count = items.items[number, :2].tolist()
                rows = row0 + items.step * np.arange(count)
                seen: dict[tuple[int, int], int] = {}
                for start, stop, ref in entries[begin:end].tolist():
                    last = min(stop, start + column_block * items.step)
                    columns = np.arange(start, last, items.step)
                    if ref < 0:
                        assert count == row_block
                        assert len(columns) == column_block
                        allowed = np.ones((count, column_block), dtype=bool)
                    else:
                        r0, r1, _, _, lo, hi = items.refs[ref].tolist()
                        distance = columns[None] - rows[:, None]
                        allowed = (distance >= lo) & (distance <= hi)
                        allowed &= ((rows >= r0) & (rows < r1))[:, None]
                    for x, y in zip(*np.nonzero(allowed), strict=True):
                        pair = int(rows[x]), int(columns[y])
                        seen[pair] = seen.get(pair, 0) + 1
                assert seen == held.get(number, {})


def test_short_ranges_share_blocks_only_where_that_saves_visits() -> None:
    """Ten documents of 20 tokens stay apart; once all see one long prompt, they are joined."""
    starts = range(200, 400, 20)
    documents = [(0, 1, s, s + 20, s, s + 20, -OPEN, 0, 1) for s in starts]
    apart = build_items(tile_table(*documents), 64, 64)[0]
    assert len(apart.items) == 10
    prompt = (0, 1, 200, 400, 0, 200, -OPEN, OPEN, 1)
    joined = build_items(tile_table(*documents, prompt), 64, 64)[0]
    assert len(joined.items) == 4  # 200 rows in blocks of 64
    assert joined.cost.sum() < 10 * (4 + 1)


def test_the_longest_programs_start_first() -> None:
    items = build_items(tile_table((0, 4, 0, 512, 0, 512, -OPEN, 0, 1)), 64, 64)[0]
    works = ordered_works(items, single_heads)
    assert len(works) == 8 * 4
    assert (np.diff(items.cost[works[:, 0]]) <= 0).all()
    assert items.cost.sum() == 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8


@pytest.mark.parametrize(
    "group, heads, parts",
    [
        (4, (0, 8), [(0, 4), (4, 8)]),
        (4, (2, 7), [(2, 4), (4, 7)]),
        (1, (1, 3), [(1, 2), (2, 3)]),
        (8, (2, 5), [(2, 5)]),
    ],
)
def test_heads_are_cut_at_their_groups(
    group: int, heads: tuple[int, int], parts: list[tuple[int, int]]
) -> None:
    assert head_groups(group)(*heads) == parts
