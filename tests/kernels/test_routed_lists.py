"""Work lists of run-time blocks against brute force: every chosen pair visited once, no other."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ringattn.kernels.block_matrix import BLOCK_TILE, BlockMatrix, BlockTiles, Selection
from ringattn.kernels.routed_lists import routed_items, routed_work
from ringattn.kernels.triton_configs import BlockConfig
from ringattn.kernels.work_lists import WorkList
from tests.kernels.problems import OPEN

TOKENS, BATCH = 60, 2


def _edges(random: np.random.Generator, blocks: int) -> np.ndarray:
    cuts = random.choice(np.arange(1, TOKENS), blocks - 1, replace=False)
    return np.array([0, *sorted(cuts.tolist()), TOKENS])


def _tiles(random: np.random.Generator, heads: int, matrices: int, most_shift: int) -> np.ndarray:
    """A few tiles, whose rows may meet; their buffers hold every pitch-th token.

    Head h of a buffer is the model's h + shift, for shifts up to `most_shift`.
    """
    pitch = int(random.integers(1, 4))
    held = TOKENS // pitch
    rows = []
    for _ in range(int(random.integers(1, 5))):
        h0, h1 = sorted(random.choice(heads + 1, 2, replace=False).tolist())
        q0, q1 = sorted(random.choice(held + 1, 2, replace=False).tolist())
        k0, k1 = sorted(random.choice(held + 1, 2, replace=False).tolist())
        lo = -OPEN if random.random() < 0.5 else int(random.integers(-20, 5))
        hi = OPEN if random.random() < 0.5 else lo + int(random.integers(5, 40)) if lo > -99 else 7
        tokens = random.integers(0, TOKENS - pitch * (held - 1), 2).tolist()
        matrix, shift = int(random.integers(matrices)), int(random.integers(most_shift + 1))
        rows.append(
            (h0, h1, q0, q1, k0, k1, lo, hi, 1, matrix, h0 + shift, *tokens, pitch),
        )
    return np.array(rows, dtype=BLOCK_TILE)


def _selection(
    random: np.random.Generator, matrices: list[BlockMatrix], selecting: int, q_heads: int
) -> Selection:
    """Blocks in no order, each once, filled up with -1 at any place; some rows choose none."""
    nq, nk = len(matrices[0].q_edges) - 1, len(matrices[0].k_edges) - 1
    most = int(random.integers(1, nk + 1))
    blocks = np.full((BATCH, selecting, nq, most), -1, dtype=np.int32)
    for row in blocks.reshape(-1, most):
        count = int(random.integers(0, most + 1))
        row[random.choice(most, count, replace=False)] = random.choice(nk, count, replace=False)
    return Selection(torch.from_numpy(blocks), q_heads)


def _wanted(tiles: BlockTiles, selection: Selection, heads: int) -> np.ndarray:
    """How often (batch, head, query row, key row) is asked for."""
    count = np.zeros((BATCH, heads, TOKENS, TOKENS), dtype=np.int64)
    chosen = selection.blocks.numpy()
    for tile in tiles.tiles:
        matrix = tiles.matrices[tile["matrix"]]
        for i in range(tile["q0"], tile["q1"]):
            token = tile["q_token"] + tile["pitch"] * i
            q_block = np.searchsorted(matrix.q_edges, token, side="right") - 1
            for j in range(tile["k0"], tile["k1"]):
                token = tile["k_token"] + tile["pitch"] * j
                k_block = np.searchsorted(matrix.k_edges, token, side="right") - 1
                if tile["lo"] <= j - i <= tile["hi"]:
                    for h in range(tile["h0"], tile["h1"]):
                        of = selection.head(int(tile["head"] - tile["h0"]) + h)
                        count[:, h, i, j] += (chosen[:, of, q_block] == k_block).any(-1)
    return count


def _programs(
    work: WorkList, row_block: int, column_block: int
) -> Iterator[tuple[int, int, list[int], set]]:
    """(batch, item, heads, pairs) of every program, as the device takes them."""
    ranges, entries = work.ranges.flatten(0, -2).tolist(), work.entries.tolist()
    items, refs = work.items.tolist(), work.refs.tolist()
    for batch in range(BATCH):
        for item, h0, h1, lists in work.works.tolist():
            row0, rows = items[item][:2]
            begin, end = ranges[batch * work.range_batch + lists + item]
            pairs = set()
            for start, stop, ref in entries[begin:end]:
                whole = ref < 0
                assert not whole or (rows == row_block and stop - start >= column_block)
                r0, r1, _, _, lo, hi = refs[max(ref, 0)]
                for i in range(row0, row0 + rows):
                    for j in range(start, min(stop, start + column_block)):
                        if whole or (r0 <= i < r1 and lo <= j - i <= hi):
                            assert (i, j) not in pairs
                            pairs.add((i, j))
            yield batch, item, list(range(h0, h1)), pairs


@pytest.mark.parametrize("by_queries", [True, False], ids=["queries", "keys"])
@pytest.mark.parametrize(
    "heads, group, selecting, share",
    [(4, 2, 2, 2), (4, 4, 4, 1), (4, 1, 1, 4), (6, 3, 3, 2), (4, 2, 4, 2), (4, 4, 4, 3)],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "shared"])
def test_lists_hold_the_chosen_pairs(
    seed: int,
    heads: int,
    group: int,
    selecting: int,
    share: int,
    by_queries: bool,
    deterministic: bool,
) -> None:
    """Buffers of a slice of the model's heads, several tiles on the same rows, several batches."""
    random = np.random.default_rng(seed)
    for _ in range(6):
        q_heads = selecting * share
        nq, nk = random.integers(1, 9, 2).tolist()
        matrices = [BlockMatrix(_edges(random, nq), _edges(random, nk), None) for _ in range(2)]
        tiles = BlockTiles(_tiles(random, heads, 2, q_heads - heads), tuple(matrices))
        selection = _selection(random, matrices, selecting, q_heads)
        count = np.zeros((BATCH, heads, TOKENS, TOKENS), dtype=np.int64)
        row_block, column_block = random.choice([4, 8, 16], 2).tolist()
        config = BlockConfig(row_block, column_block, warps=4, stages=1)
        for routed in routed_items(tiles, row_block, by_queries=by_queries):
            made = routed_work(routed, selection, config, group, deterministic=deterministic)
            for work, shared in made:
                owners: dict[tuple[int, int, int], int] = {}
                for batch, item, of, pairs in _programs(work, row_block, column_block):
                    row0, rows = work.items[item, :2].tolist()
                    assert rows <= row_block
                    for i in range(row0, row0 + rows):
                        for head in {h if by_queries else h // group for h in of}:
                            owners[batch, head, i] = owners.get((batch, head, i), 0) + 1
                    assert by_queries or len({h // group for h in of}) == 1
                    for i, j in pairs:
                        at = (i, j) if by_queries else (j, i)
                        for h in of:
                            count[batch, h, *at] += 1
                assert shared or max(owners.values()) == 1
                assert not (deterministic and shared)
        np.testing.assert_array_equal(count, _wanted(tiles, selection, heads))


@pytest.mark.parametrize("by_queries", [True, False], ids=["queries", "keys"])
def test_the_second_launch_copies_nothing_to_the_device(
    seed: int, by_queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from the host would wait for all work queued on the device, at every launch."""
    random = np.random.default_rng(seed)
    matrix = BlockMatrix(_edges(random, 5), _edges(random, 6), None)
    tiles = BlockTiles(_tiles(random, 4, 1, 0), (matrix,))
    selection = _selection(random, [matrix], 2, 4)
    for routed in routed_items(tiles, 8, by_queries=by_queries):
        config = BlockConfig(8, 8, warps=4, stages=1)
        first = routed_work(routed, selection, config, 2, deterministic=False)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "from_numpy", lambda _: pytest.fail("copied to the device again"))
            again = routed_work(routed, selection, config, 2, deterministic=False)
        for (old, _), (new, _) in zip(first, again, strict=True):
            assert torch.equal(old.works, new.works)
            assert torch.equal(old.ranges, new.ranges)


@pytest.mark.parametrize("by_queries", [True, False], ids=["queries", "keys"])
def test_blocks_inside_their_band_need_no_mask(by_queries: bool) -> None:
    """Causal, four blocks of 16, all chosen: those below the diagonal are whole."""
    edges = np.arange(0, 65, 16)
    row = (0, 1, 0, 64, 0, 64, -OPEN, 0, 1, 0, 0, 0, 0, 1)
    tiles = BlockTiles(np.array([row], dtype=BLOCK_TILE), (BlockMatrix(edges, edges, None),))
    chosen = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4)
    (routed,) = routed_items(tiles, 16, by_queries=by_queries)
    ((work, _),) = routed_work(
        routed, Selection(chosen, 1), BlockConfig(16, 16, 4, 1), 1, deterministic=True
    )
    spans = [work.entries[a:b, 2] for a, b in work.ranges.view(-1, 2).tolist()]
    refs = torch.cat(spans)
    assert (refs < 0).sum() == 6
    assert (refs == 0).sum() == 4
