"""Rows that are cheap to compute again: which ones, their mask, their plan."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import UserError, layouts, masks
from ringattn.cost import price
from ringattn.selective import Part, cheap_part, cheap_rows
from tests.core.cases import LAYOUTS, MASKS, inputs, mask_of
from tests.pairwise import pairwise

FIXED = [name for name in MASKS if mask_of(name).routing is None]
RANGES = {
    "none": [],
    "some": [(0, 3), (9, 10), (20, 41)],
    "one row": [(30, 31)],
    "all": [(0, 61)],
}
METHODS = ("ring", "burst", "double_ring", "all_gather", "direct", "tile", "ulysses", "usp",
           "loongtrain", "hybrid")  # fmt: skip


def _rows(ranges: np.ndarray, length: int) -> np.ndarray:
    """bool (length,): whether a row lies in one of the ranges."""
    inside = np.zeros(length, dtype=bool)
    for start, stop in ranges:
        inside[start:stop] = True
    return inside


@pytest.mark.parametrize("name", FIXED)
def test_a_mask_of_some_queries_is_exact(name: str) -> None:
    mask = mask_of(name)
    for ranges in RANGES.values():
        table = np.array(ranges, dtype=np.int64).reshape(-1, 2)
        part = mask.restrict_queries(table)
        want = mask.dense() & _rows(table, mask.seq_len)[:, None]
        assert np.array_equal(part.dense(), want)
        assert part.area == want.sum()
        assert part.heads == mask.heads


def test_blocks_selected_at_run_time_cannot_be_cut() -> None:
    mask = mask_of("routed")
    with pytest.raises(UserError, match="selected for all queries"):
        mask.restrict_queries(np.array([(0, 4)]))
    assert not len(cheap_rows(mask, 0.5))
    context = ra.ContextParallel(2, heads=(4, 2), head_dim=8, method="ring", layout="zigzag")
    assert cheap_part(context.plan(mask), 0.5).plan is None


def test_the_first_half_of_a_causal_sequence_is_a_quarter() -> None:
    # The diagonal makes the first half a little more than a quarter.
    assert cheap_rows(masks.causal(1 << 14), 0.25).tolist() == [[0, (1 << 13) - 128]]
    ranges = cheap_rows(masks.documents([4096, 2048, 4096], causal=True), 0.25)
    assert ranges[:, 0].tolist() == [0, 4096, 6144]
    lengths = ranges[:, 1] - ranges[:, 0]
    assert abs(lengths[0] - lengths[2]) <= 128  # equally cheap rows of both long documents
    assert lengths.min() > 1500
    assert not (ranges % 128).any()


@pytest.mark.parametrize("name", FIXED)
def test_no_row_left_out_is_cheaper(name: str) -> None:
    mask = mask_of(name)
    area = mask.row_area(np.arange(mask.seq_len), np.arange(mask.seq_len) + 1)
    for share in (0.0, 0.1, 0.4, 1.0):
        ranges = cheap_rows(mask, share)
        chosen = _rows(ranges, mask.seq_len)
        part = mask.row_area(*ranges.T).sum()
        assert part <= share * mask.area
        assert chosen.all() == (share == 1.0)
        if not mask.matrices and chosen.any() and not chosen.all():  # here rows are chunks
            assert area[chosen].max() <= area[~chosen].min()


def test_ranks_spend_alike() -> None:
    """Under zigzag the cheap half of a causal sequence is unequally dear to the ranks."""
    mask, world = masks.causal(1 << 17), 8
    layout = layouts.zigzag(mask.seq_len, world)
    ranges = cheap_rows(mask, 0.25, layout)
    part = mask.restrict_queries(ranges)
    spent = [part.row_area(p, p + 1).sum() for p in map(layout.positions, range(world))]
    assert max(spent) <= 0.25 * mask.area / world
    assert min(spent) > 0.22 * mask.area / world


def _allowed(case: dict) -> bool:
    layout = LAYOUTS[case["layout"]](mask_of(case["mask"]), case["world"])
    shared = case["method"] in ("ulysses", "usp", "loongtrain", "hybrid")
    return not (shared and (layout.ranges["step"] > 1).any())


CASES = pairwise(
    {
        "mask": FIXED,
        "method": list(METHODS),
        "layout": ["zigzag", "striped", "uneven", "zero_tokens", "scattered"],
        "world": [1, 2, 4],
        "share": [0.0, 0.3, 1.0],
    },
    _allowed,
)


def _plan(case: dict) -> ra.Plan:
    mask = mask_of(case["mask"])
    context = ra.ContextParallel(
        case["world"],
        heads=(4, 4),
        head_dim=8,
        method=case["method"],
        layout=LAYOUTS[case["layout"]](mask, case["world"]),
        kernel="matmul",
    )
    return context.plan(mask)


@pytest.mark.parametrize("number", range(0, len(CASES), 8))
def test_the_plan_of_the_rows_gives_their_attention(number: int) -> None:
    for case in CASES[number : number + 8]:
        try:
            plan = _plan(case)
        except UserError:
            continue
        part = cheap_part(plan, case["share"])
        assert cheap_part(plan, case["share"]) is part
        if part.plan is None:
            assert not len(part.ranges)
            continue
        ra.verify(part.plan)
        x = inputs(plan.mask.seq_len, 1, 1)
        want = ra.reference(x.q, x.k, x.v, plan.mask)
        got = ra.simulate(part.plan, x.q, x.k, x.v)
        inside = _rows(part.ranges, plan.mask.seq_len)
        assert torch.allclose(got.out[:, inside], want.out[:, inside], atol=1e-12), case
        assert torch.allclose(got.lse[:, inside], want.lse[:, inside], atol=1e-12), case
        assert not got.out[:, ~inside].any()
        _check_kept(plan, part, inside)


def _check_kept(plan: ra.Plan, part: Part, inside: np.ndarray) -> None:
    positions = plan.layout.positions(0)
    kept = part.kept_rows(plan, torch.device("cpu")).numpy()
    assert np.array_equal(np.flatnonzero(~inside[positions]), kept)


@pytest.mark.parametrize("method", METHODS)
def test_plans_of_nothing(method: str) -> None:
    """A mask of no query is planned, verified and gives nothing."""
    mask = masks.causal(64).restrict_queries(np.empty((0, 2), dtype=np.int64))
    context = ra.ContextParallel(4, heads=(4, 4), head_dim=8, method=method, layout="zigzag")
    plan = context.plan(mask)
    ra.verify(plan)
    x = inputs(64, 1, 1)
    got = ra.simulate(plan, x.q, x.k, x.v, x.dout)
    assert got.dq is not None
    assert not got.out.any()
    assert got.lse.isneginf().all()
    assert not got.dq.any()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_with_a_cluster_the_predicted_time_stays_within_the_share(share: float) -> None:
    def make() -> ra.Plan:
        context = ra.ContextParallel(8, heads=(32, 8), head_dim=128, cluster="h100_sxm")
        return context.plan(masks.causal(1 << 18))

    plan = make()
    part = cheap_part(plan, share)
    assert part.plan is not None
    cluster = plan.context.cluster
    assert cluster is not None
    times = [price(p.forward, cluster).seconds for p in (part.plan, plan)]
    assert 0.8 * share < part.share <= share
    assert times[0] / times[1] == pytest.approx(part.share)
    other = cheap_part(make(), share)
    assert other.plan is not None
    assert other.plan.digest == part.plan.digest


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_are_shares(share: float) -> None:
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        cheap_rows(masks.causal(8), share)
