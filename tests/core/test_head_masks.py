"""Masks per head group and block matrices: what they allow, their tiles, bytes and errors."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import UserError, layouts, masks
from ringattn.block_tiles import key_runs, see
from ringattn.blocks import restricted_area
from ringattn.kernels.block_matrix import BLOCK_TILE, allowed_pairs
from ringattn.methods import METHODS
from tests.core.cases import HEAD_MASKS, LAYOUTS, mask_of, problem


def _blocks(matrix: np.ndarray, q_sizes: list[int], k_sizes: list[int]) -> np.ndarray:
    """The dense matrix, written out."""
    rows = [np.concatenate([np.full(n, x) for x, n in zip(row, k_sizes, strict=True)])
            for row in matrix]  # fmt: skip
    return np.concatenate([np.tile(r, (n, 1)) for r, n in zip(rows, q_sizes, strict=True)])


@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_any_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q_sizes, k_sizes = rng.integers(1, 12, 6).tolist(), rng.integers(1, 12, 5).tolist()
    k_sizes[-1] += max(0, sum(q_sizes) - sum(k_sizes))
    q_sizes[-1] += max(0, sum(k_sizes) - sum(q_sizes))
    matrix = rng.random((6, 5)) < 0.4
    mask = masks.blocks(matrix, q_sizes, k_sizes)
    want = _blocks(matrix, q_sizes, k_sizes)
    assert (mask.dense() == want).all()
    assert mask.area == want.sum()
    within = masks.blocks(matrix, q_sizes, k_sizes, within=masks.causal(sum(q_sizes)))
    assert (within.dense() == np.tril(want)).all()
    assert within.area == np.tril(want).sum()


def test_blocks_per_head_group_and_a_short_last_block() -> None:
    matrix = np.random.default_rng(0).random((3, 4, 7)) < 0.5
    mask = masks.blocks(matrix, 8, 4, seq_len=27)
    assert mask.dense().shape == (3, 27, 27)
    for group in range(3):
        want = _blocks(matrix[group], [8, 8, 8, 3], [4] * 6 + [3])
        assert (mask.dense()[group] == want).all()
    assert mask.area == mask.dense().sum()
    assert mask.head_counts(12).tolist() == [4, 4, 4]


def test_a_mask_per_head_group() -> None:
    window, causal = masks.sliding_window(20, 3, 0), masks.causal(20)
    groups = masks.blocks(np.eye(4, dtype=bool)[None].repeat(2, 0), 5, 5)
    mask = masks.per_head([(1, causal), (4, groups), (3, window)])
    want = [causal.dense()] + 4 * [groups.dense()[0]] + 3 * [window.dense()]
    assert (mask.dense() == np.stack(want)).all()
    assert mask.area == sum(int(x.sum()) for x in want)
    assert mask.head_counts(8).tolist() == [1, 2, 2, 3]
    assert mask != masks.per_head([(2, causal), (3, groups.for_heads(2, 0, 1)), (3, window)])


@pytest.mark.parametrize("name", HEAD_MASKS)
@pytest.mark.parametrize("first_last", [(0, 4), (0, 1), (1, 3), (2, 4), (3, 4)])
def test_the_mask_of_some_heads(name: str, first_last: tuple[int, int]) -> None:
    mask, (first, last) = mask_of(name), first_last
    layers = mask.dense()
    layers = np.stack([layers] * 4) if layers.ndim == 2 else np.repeat(layers, 4 // len(layers), 0)
    part = mask.for_heads(4, first, last).dense()
    part = part[None] if part.ndim == 2 else part
    assert (layers[first:last] == np.repeat(part, (last - first) // len(part), axis=0)).all()


@pytest.mark.parametrize("name", [n for n in HEAD_MASKS if not n.startswith("routed")])
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_tiles_are_the_mask_of_each_group(name: str, layout_name: str) -> None:
    mask = mask_of(name)
    for world in (1, 3, 4):
        layout = LAYOUTS[layout_name](mask, world)
        pieces, owner = see(mask, layout.ranges, layout.ranges), layout.ranges["owner"]
        seen = np.zeros((len(mask.heads), mask.seq_len, mask.seq_len), dtype=int)
        needed = {i: np.zeros(mask.seq_len, bool) for i in range(len(pieces))}
        for index, piece in enumerate(pieces):
            tile = np.zeros(1, dtype=BLOCK_TILE)
            for column in ("q0", "q1", "k0", "k1", "lo", "hi", "q_token", "k_token", "pitch"):
                tile[column] = piece[column]
            number, rows = mask.matrix[piece["band"]], np.arange(piece["q0"], piece["q1"])
            keys = np.arange(piece["k0"], piece["k1"])
            if number < 0:
                distance = keys[None, :] - rows[:, None]
                allowed = (distance >= piece["lo"]) & (distance <= piece["hi"])
            else:
                allowed = allowed_pairs(tile[0], mask.matrices[number])
            assert allowed.sum() == piece["area"] > 0
            assert allowed[:, [0, -1]].any(axis=0).all(), "keys at the ends are needed"
            q = layout.positions(int(owner[piece["qseg"]]))[rows]
            k = layout.positions(int(owner[piece["kseg"]]))[keys]
            seen[mask.group[piece["band"]]][np.ix_(q, k)] += allowed
            needed[index][keys] = allowed.any(axis=0)
        dense = mask.dense()
        last = np.cumsum([mask.copies(g) for g in range(len(mask.heads))]) - 1
        assert (seen == (dense[last] if dense.ndim == 3 else dense[None])).all()
        for index, first, end in zip(*key_runs(mask, pieces), strict=True):
            assert needed[index][first:end].all()
            needed[index][first:end] = False
        assert not any(rows.any() for rows in needed.values())


@pytest.mark.parametrize("name", HEAD_MASKS)
def test_row_areas_add_up(name: str) -> None:
    mask = mask_of(name)
    cuts = np.array([0, 13, 14, 40, mask.seq_len])
    areas = mask.row_area(cuts[:-1], cuts[1:])
    assert areas.sum() == pytest.approx(mask.area, abs=len(cuts) * len(mask.bands))
    assert restricted_area(mask).sum() > 0
    whole = mask.row_area(np.array([0]), np.array([mask.seq_len]))
    assert whole[0] == mask.area


@pytest.mark.parametrize("method", ["ring", "direct", "double_ring", "tile", "burst"])
def test_a_narrow_group_moves_no_more_than_it_needs(method: str) -> None:
    """A window on half of the key heads moves what the window alone moves on that half."""
    seq_len = 64
    wide, narrow = masks.causal(seq_len), masks.sliding_window(seq_len, 3, 0)
    layout = layouts.contiguous(seq_len, 4)
    mixed = masks.per_head([(2, wide), (2, narrow)])
    for direction in ("forward", "backward"):
        plans = [
            getattr(METHODS[method], direction)(problem(mask, layout, group=1))
            for mask in (mixed, wide, narrow)
        ]
        for rank in range(4):
            both = [p.bytes(rank) for p in plans]
            assert both[0] == (both[1] + both[2]) // 2


@pytest.mark.parametrize("method", ["ulysses", "usp"])
def test_head_slices_share_the_work_of_uneven_heads(method: str) -> None:
    """One full head and seven windows: the slice with the full head takes no more heads."""
    mask = masks.per_head([(1, masks.full(256)), (7, masks.sliding_window(256, 7, 0))])
    context = ra.ContextParallel(
        2, heads=(8, 8), head_dim=8, method=method, options={"u": 2}, layout="contiguous"
    )
    work = context.plan(mask).forward.work.sum(axis=1)
    assert work[0] == pytest.approx(256 * 256 / 8)


def test_direct_moves_only_blocks_that_are_attended() -> None:
    matrix = np.zeros((8, 8), dtype=bool)
    matrix[0, [2, 7]] = matrix[7, 0] = matrix[3, 3] = True
    mask, layout = masks.blocks(matrix, 8, 8), layouts.contiguous(64, 4)
    forward = METHODS["direct"].forward(problem(mask, layout))
    moved = {(int(m["dst"]), int(m["src"]), int(m["s0"]), int(m["rows"])) for m in forward.moves}
    assert moved == {(0, 1, 0, 8), (0, 3, 8, 8), (3, 0, 0, 8)}


BAD = {
    "sizes": (lambda: masks.blocks(np.ones((2, 2)), [3, 4], [3, 5]), "block_k of 2 blocks"),
    "count": (lambda: masks.blocks(np.ones((2, 3)), 4, 4), "make 2 such blocks, the matrix has 3"),
    "shape": (lambda: masks.blocks(np.ones(3), 4, 4), "query blocks, key blocks"),
    "values": (lambda: masks.blocks(np.full((2, 2), 3), 4, 4), "must hold booleans"),
    "zero": (lambda: masks.blocks(np.ones((2, 2)), [0, 8], 4), "positive integer"),
    "negative": (lambda: masks.blocks(np.ones((2, 2)), -4, 4), "positive integer"),
    "length": (lambda: masks.blocks(np.ones((2, 2)), 4, 4, seq_len=9, within=masks.causal(8)),
               "`within` has 8 tokens"),
    "within": (lambda: masks.blocks(np.ones((2, 2)), 4, 4, within=masks.blocks(
        np.ones((2, 2)), 4, 4)), "one mask for all heads"),
    "empty": (lambda: masks.per_head([]), "at least one group"),
    "heads": (lambda: masks.per_head([(0, masks.causal(4))]), "positive integer"),
    "pair": (lambda: masks.per_head([(1, "causal")]), "(query heads, mask)"),  # type: ignore[list-item]
    "no list": (lambda: masks.per_head((4, masks.causal(4))), "list of (query heads, mask)"),  # type: ignore[arg-type]
    "a number": (lambda: masks.routed(1024, block_k=4, top_k=1), "must be a mask"),  # type: ignore[arg-type]
    "ragged": (lambda: masks.blocks([[True] * 2, [True]], 4, 4), "query blocks, key blocks"),  # type: ignore[arg-type]
    "lengths": (lambda: masks.per_head([(1, masks.causal(4)), (1, masks.causal(5))]), "one length"),
    "nested": (lambda: masks.per_head([(1, masks.routed(masks.causal(8), block_k=4, top_k=1))]),
               "routed mask serves all heads"),
    "shares": (lambda: masks.per_head([(3, masks.blocks(np.ones((2, 2, 2)), 4, 4))]),
               "must make up the query heads"),
    "top_k": (lambda: masks.routed(masks.causal(64), block_k=4, block_q=16, top_k=3),
              "holds tokens of 4 blocks"),
    "scores": (lambda: masks.routed(masks.causal(1 << 20), block_k=8, top_k=8), "pairs of blocks"),
    "block": (lambda: masks.routed(masks.causal(64), block_k=0, top_k=3), "block_k=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_refused_in_one_line(name: str) -> None:
    build, reason = BAD[name]
    with pytest.raises(UserError) as error:
        build()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_stripes_over_a_large_matrix_are_refused() -> None:
    """They would take hours; every stripe meets every block."""
    mask = masks.blocks(np.ones((4096, 4096), dtype=bool), 64, 64)
    layout = layouts.striped(mask.seq_len, 64)
    with pytest.raises(UserError, match="use a layout of longer ranges"):
        see(mask, layout.ranges, layout.ranges)


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_do_not_fit_the_model_are_refused(method: str) -> None:
    context = ra.ContextParallel(4, heads=(8, 2), head_dim=8, method=method, layout="contiguous")
    with pytest.raises(UserError, match="head groups"):
        context.plan(masks.per_head([(4, masks.causal(64)), (3, masks.full(64))]))


def test_the_reference_refuses_other_head_counts() -> None:
    mask = masks.per_head([(8, masks.causal(16)), (24, masks.full(16))])
    q = torch.randn(1, 16, 8, 4)
    with pytest.raises(UserError, match="head groups"):
        ra.reference(q, q, q, mask)


def test_equal_masks_have_equal_keys() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.random((2, 4, 4)) < 0.5
    other = matrix.copy()
    other[1, 2, 3] ^= True
    made = [masks.blocks(m, 4, 4) for m in (matrix, matrix.copy(), other)]
    made.append(masks.blocks(matrix[0], 4, 4))
    made.append(masks.blocks(matrix, [4, 4, 4, 4], 4, within=masks.causal(16)))
    made.append(masks.routed(masks.causal(16), block_k=4, top_k=2))
    made.append(masks.routed(masks.causal(16), block_k=4, top_k=3))
    keys = [m.key for m in made]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1
    assert all(a != b for a, b in pairwise(keys[1:]))
