"""Layouts: every token once, positions that agree with the ranges, even and uneven shares."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Layout, Mask, UserError, layouts, masks
from ringattn.balance import Work
from ringattn.choice import imbalance
from ringattn.sharding import join_shards, take_shard
from tests.core.cases import LAYOUTS

SIZES = [1, 2, 3, 7, 64, 61]
WORLDS = [1, 2, 3, 4, 7]


def _check(layout: Layout) -> None:
    """Every token once; rows, ranges, sizes and positions tell the same."""
    shards = [layout.positions(rank) for rank in range(layout.world)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(layout.seq_len))
    assert layout.sizes.tolist() == [len(shard) for shard in shards]
    assert layout.order().tolist() == np.concatenate(shards).tolist()
    assert len(set(layout.ranges["step"].tolist())) <= 1
    for rank, shard in enumerate(shards):
        mine = layout.ranges[layout.ranges["owner"] == rank]
        row = 0
        for r in mine:
            tokens = np.arange(r["start"], r["stop"], r["step"])
            assert r["offset"] == row
            assert len(tokens) > 0
            assert (shard[row : row + len(tokens)] == tokens).all()
            row += len(tokens)
        assert row == len(shard)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_token_has_one_rank_and_row(name: str, world: int) -> None:
    for seq_len in SIZES:
        if name == "uneven" and seq_len < 5 * world:
            continue
        _check(LAYOUTS[name](masks.causal(seq_len), world))


@pytest.mark.parametrize("name", layouts.NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_shares_differ_by_little(name: str, world: int) -> None:
    """Contiguous and striped by one token, zigzag by two, area-greedy by two chunks (one may be
    short)."""
    for seq_len in SIZES:
        sizes = layouts.by_name(name, masks.causal(seq_len), world).sizes
        slack = {"zigzag": 2, "area_greedy": 2 * max(1, seq_len // (8 * world))}.get(name, 1)
        assert sizes.max() - sizes.min() <= slack, (seq_len, sizes)


def test_the_named_layouts_place_tokens_as_published() -> None:
    assert layouts.contiguous(8, 4).positions(1).tolist() == [2, 3]
    assert layouts.zigzag(8, 2).positions(0).tolist() == [0, 1, 6, 7]
    assert layouts.zigzag(8, 2).positions(1).tolist() == [2, 3, 4, 5]
    assert layouts.striped(7, 3).positions(1).tolist() == [1, 4]
    assert layouts.striped(10, 2, 2).positions(1).tolist() == [2, 3, 6, 7]
    assert layouts.contiguous(6, 3, [4, 0, 2]).positions(2).tolist() == [4, 5]
    assert layouts.contiguous(6, 3, [4, 0, 2]).positions(1).tolist() == []


def test_striped_is_one_range_per_rank() -> None:
    assert len(layouts.striped(1 << 20, 64).ranges) == 64


def test_fewer_tokens_than_ranks() -> None:
    for name in layouts.NAMES:
        layout = layouts.by_name(name, masks.causal(3), 5)
        _check(layout)
        assert layout.sizes.max() <= 2
        assert (layout.sizes == 0).sum() >= 2


def test_ranges_that_continue_each_other_are_joined() -> None:
    layout = layouts.from_ranges(12, 2, [(0, 3, 1, 0), (3, 6, 1, 0), (6, 9, 1, 1), (9, 12, 1, 0)])
    assert [tuple(r)[:2] for r in layout.ranges.tolist()] == [(0, 6), (9, 12), (6, 9)]
    assert len(layouts.zigzag(64, 1).ranges) == 1
    joined = layouts.zigzag(64, 4).ranges
    assert (joined["owner"] == 3).sum() == 1  # chunks 3 and 4 are neighbours


def test_rows_follow_the_given_order_within_a_rank() -> None:
    layout = layouts.from_ranges(6, 2, [(4, 6, 1, 0), (2, 4, 1, 1), (0, 2, 1, 0)])
    assert layout.positions(0).tolist() == [4, 5, 0, 1]


def test_strided_ranges_are_cropped_to_their_last_token() -> None:
    layout = layouts.from_ranges(8, 2, [(0, 8, 2, 0), (1, 8, 2, 1)])
    assert layout.positions(1).tolist() == [1, 3, 5, 7]
    _check(layout)


@given(st.data())
def test_any_partition_into_runs_is_a_layout(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 4))
    step = data.draw(st.integers(1, 4))
    blocks = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    rows = []
    for residue in range(step):
        at = residue
        for count in blocks:
            rows.append(
                (at, at + (count - 1) * step + 1, step, data.draw(st.integers(0, world - 1)))
            )
            at += count * step
    seq_len = sum(blocks) * step
    order = data.draw(st.permutations(rows))
    layout = layouts.from_ranges(seq_len, world, order)
    _check(layout)
    with pytest.raises(UserError, match="exactly once"):
        layouts.from_ranges(seq_len, world, [*order, rows[0]])
    with pytest.raises(UserError, match="exactly once"):
        layouts.from_ranges(seq_len, world, order[:-1])


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(320),
        masks.documents([120, 9, 41, 100, 50], causal=True),
        masks.prefix_lm(320, 90),
    ],
    ids=lambda mask: mask.name,
)
def test_area_greedy_balances_area_and_tokens(mask: Mask, world: int) -> None:
    greedy = layouts.area_greedy(mask, world)
    assert imbalance(mask, greedy) < 1.1
    assert imbalance(mask, greedy) < imbalance(mask, layouts.contiguous(mask.seq_len, world))
    exact = [mask.dense()[greedy.positions(rank)].sum() for rank in range(world)]
    assert imbalance(mask, greedy) == pytest.approx(max(exact) / np.mean(exact))


def test_zigzag_balances_causal_exactly() -> None:
    assert imbalance(masks.causal(64), layouts.zigzag(64, 4)) == 1.0


MIXED = masks.documents([9000, 300, 1200, 50, 7000, 80, 5000, 600, 9000, 538], causal=True)


@pytest.mark.parametrize("name", ["node_balanced", "hybrid"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    "mask",
    [masks.causal(1 << 15), MIXED, masks.causal_blockwise([8000, 300, 4000, 20_468])],
    ids=lambda mask: mask.name,
)
def test_teams_are_balanced_with_equal_tokens(name: str, group: int, mask: Mask) -> None:
    layout = layouts.by_name(name, mask, 16, 4, group=group)
    _check(layout)
    assert layout.sizes.max() - layout.sizes.min() <= 1
    order = np.argsort(layout.ranges["start"])
    ranges = layout.ranges[order]
    work = Work(mask).load(ranges["start"], ranges["stop"])
    load = np.bincount(ranges["owner"] // group, weights=work, minlength=16 // group)
    assert load.max() <= 1.1 * load.mean()


def test_unequal_tokens_balance_what_equal_ones_cannot() -> None:
    # Nearly all work is in the first document, whose queries all cost the same.
    mask = masks.documents([4000, *[8] * 1500], causal=False)
    for limit in (1.0, 1.05, 1.25):
        layout = layouts.node_balanced(mask, 8, 2, group=1, chunk=2000, max_imbalance=limit)
        _check(layout)
        assert layout.sizes.max() <= limit * mask.seq_len / 8 + 1
    causal = masks.causal(1 << 14)
    strict, loose = (
        imbalance(causal, layouts.node_balanced(causal, 4, 2, chunk=4096, group=1, max_imbalance=m))
        for m in (1.0, 1.3)
    )
    assert loose <= strict


def test_short_documents_stay_whole() -> None:
    layout = layouts.hybrid(MIXED, 8, 4)
    for band in MIXED.bands:
        if band["q1"] - band["q0"] <= 700:
            inside = (layout.ranges["start"] < band["q1"]) & (band["q0"] < layout.ranges["stop"])
            assert len(set(layout.ranges["owner"][inside].tolist())) == 1


def test_area_greedy_cuts_long_sequences_at_multiples_of_128() -> None:
    ranges = layouts.area_greedy(masks.causal(1 << 16), 4).ranges
    assert (ranges["start"] % 128 == 0).all()


def test_keys_tell_layouts_apart() -> None:
    built = [
        layouts.contiguous(64, 4),
        layouts.contiguous(64, 2),
        layouts.contiguous(65, 4),
        layouts.zigzag(64, 4),
        layouts.striped(64, 4),
        layouts.striped(64, 4, 2),
        layouts.contiguous(64, 4, [16, 16, 15, 17]),
    ]
    assert len({layout.key for layout in built}) == len(built)
    assert layouts.contiguous(64, 4).key == layouts.contiguous(64, 4, [16] * 4).key


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_shards_and_the_whole(name: str, dim: int) -> None:
    layout = LAYOUTS[name](masks.causal(61), 3)
    whole = torch.arange(61 * 6).view(61, 2, 3).transpose(0, dim)
    shards = [take_shard(whole, layout, rank, dim) for rank in range(3)]
    for rank, shard in enumerate(shards):
        picked = whole.index_select(dim, torch.from_numpy(layout.positions(rank)))
        assert torch.equal(shard, picked)
        assert shard.is_contiguous()
    assert torch.equal(join_shards(shards, layout, dim), whole)


@pytest.mark.parametrize(
    "build, rule",
    [
        (lambda: layouts.from_ranges(8, 2, [(0, 9, 1, 0)]), r"lie in \[0, 8\)"),
        (lambda: layouts.from_ranges(8, 2, [(0, 8, 1, 2)]), r"rank in \[0, 2\)"),
        (lambda: layouts.from_ranges(8, 2, [(-1, 8, 1, 0)]), r"lie in \[0, 8\)"),
        (lambda: layouts.from_ranges(8, 2, [(0, 8, 0, 0)]), "step >= 1"),
        (lambda: layouts.from_ranges(8, 2, [(0, 4, 1, 0), (4, 8, 2, 0), (5, 8, 2, 1)]), "one step"),
        (lambda: layouts.from_ranges(8, 2, []), "exactly once"),
        (lambda: layouts.from_ranges(8, 2, [(0, 4, 1, 0), (5, 8, 1, 1)]), "exactly once"),
        (lambda: layouts.from_ranges(8, 2, [(0, 5, 1, 0), (4, 8, 1, 1)]), "exactly once"),
        (lambda: layouts.contiguous(8, 2, [4, 5]), "sum to 8"),
        (lambda: layouts.contiguous(8, 2, [9, -1]), "non-negative"),
        (lambda: layouts.contiguous(8, 2, [8]), "2 non-negative"),
        (lambda: layouts.striped(8, 2, 0), ">= 1"),
        (lambda: layouts.area_greedy(masks.causal(8), 2, 0), ">= 1"),
        (lambda: layouts.node_balanced(masks.causal(8), 4, 4, 0), ">= 1"),
        (lambda: layouts.node_balanced(masks.causal(8), 4, 4, group=3), "divide the 4 ranks"),
        (lambda: layouts.hybrid(masks.causal(8), 4, 4, max_imbalance=0.9), "1.0 to 2.0"),
        (lambda: layouts.by_name("zigzag", masks.causal(8), 2, chunk=4), "has none"),
        (lambda: layouts.by_name("zigzagg", masks.causal(8), 2), "zigzag"),
    ],
)
def test_refused(build: Any, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        build()
