"""The planner: the choice is the fastest, the same everywhere, within the limits, and it runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn import UserError, masks
from ringattn.benchmarks.method_sweep import sweep
from ringattn.candidates import AUTO_METHODS, candidates
from ringattn.cost import load_cluster, peak_bytes, price_pair
from ringattn.least_time import least_seconds
from ringattn.masks import Mask
from ringattn.methods import METHODS
from ringattn.schedule import Wire
from ringattn.timeline import MOST_RANKS, chrome_trace, draw_timeline, shown_ranks

TOKENS = 1 << 15
MASKS = {
    "causal": lambda: masks.causal(TOKENS),
    "window": lambda: masks.sliding_window(TOKENS, 1023, 0),
    "documents": lambda: masks.documents([12_000, 400, 900, 7_000, 2_468, 10_000], causal=True),
    "short": lambda: masks.documents([512] * 64, causal=True),
    "blockwise": lambda: masks.causal_blockwise([8_000, 300, 4_000, 20_468]),
}


def context(world: int = 16, **changes: Any) -> ra.ContextParallel:
    values: dict[str, Any] = {
        "heads": (32, 8), "head_dim": 128, "dtype": torch.bfloat16, "cluster": "h100_sxm",
    }  # fmt: skip
    return ra.ContextParallel(world, **(values | changes))


@pytest.mark.parametrize("name", MASKS)
def test_bounds_never_change_the_choice(name: str) -> None:
    mask = MASKS[name]()
    quick, full = context().compare(mask), context().compare(mask, exhaustive=True)
    assert quick.best.candidate == full.best.candidate
    assert quick.best.seconds == full.best.seconds == min(q.seconds for q in full.quotes)
    assert not any("passed over" in refusal.reason for refusal in full.refusals)
    priced = {quote.candidate: quote for quote in full.quotes}
    for refusal in quick.refusals:
        if "passed over" in refusal.reason:
            assert priced[refusal.candidate].seconds > full.best.seconds


@pytest.mark.parametrize("name", MASKS)
def test_no_bound_exceeds_the_price(name: str) -> None:
    mask, cp = MASKS[name](), context()
    cluster = load_cluster("h100_sxm")
    for quote in cp.compare(mask, exhaustive=True).quotes:
        problem = cp._problem(mask, quote.layout)
        floor = least_seconds(quote.candidate, problem, cluster, None)
        for least, priced in zip(floor, quote.priced, strict=True):
            assert least <= priced.seconds, quote.candidate


def test_a_quote_is_the_price_of_the_plan_that_is_made() -> None:
    mask, cp = MASKS["documents"](), context()
    plan, best = cp.plan(mask), cp.compare(mask).best
    assert (plan.layout.name, plan.method) == (best.candidate.layout, best.candidate.method)
    schedules = (plan.forward, plan.backward)
    assert [p.seconds for p in price_pair(schedules, load_cluster("h100_sxm"))] == [
        p.seconds for p in best.priced
    ]
    assert best.peak_bytes == max(int(peak_bytes(s).max()) for s in schedules)
    received = [plan.bytes(r, "forward") + plan.bytes(r, "backward") for r in range(16)]
    assert best.received.sum(axis=0).tolist() == received


@pytest.mark.parametrize("name", MASKS)
def test_two_builds_choose_alike(name: str) -> None:
    first, second = (context().plan(MASKS[name]()) for _ in range(2))
    assert first.digest == second.digest


def test_auto_fits_the_mask() -> None:
    window = context().plan(MASKS["window"]())
    assert (window.layout.name, window.method) == ("contiguous", "direct")
    short = context().plan(MASKS["short"]())
    assert sum(short.bytes(rank, "forward") for rank in range(16)) == 0


def test_the_choice_is_exact(tmp_path: Any) -> None:
    mask = masks.documents([50, 3, 40, 35], causal=True)
    cp = context(
        4, heads=(4, 2), head_dim=8, dtype=torch.float64, ranks_per_node=2, cluster="cpu_gloo"
    )
    q, k, v = (torch.randn(1, 128, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    plan = cp.plan(mask)
    ra.verify(plan)
    got, want = ra.simulate(plan, q, k, v), ra.reference(q, k, v, mask)
    torch.testing.assert_close(got.out, want.out, rtol=1e-12, atol=1e-12)


def test_memory_limit_is_respected() -> None:
    mask = MASKS["causal"]()
    free = context().compare(mask, exhaustive=True)
    limit = sorted(quote.peak_bytes for quote in free.quotes)[2]
    assert free.best.peak_bytes > limit
    cp = context(memory_limit=limit)
    tight = cp.compare(mask, exhaustive=True)
    assert all(quote.peak_bytes <= limit for quote in tight.quotes)
    assert tight.best.seconds == min(q.seconds for q in free.quotes if q.peak_bytes <= limit)
    assert any(f"memory_limit={limit}" in refusal.reason for refusal in tight.refusals)
    plan = cp.plan(mask)
    assert max(plan.peak_bytes(rank) for rank in range(16)) <= limit
    with pytest.raises(UserError, match="memory_limit=1000"):
        context(memory_limit=1000).plan(mask)


def _names(mask: Mask, **changes: Any) -> set[tuple[str, str]]:
    quotes = context(**changes).compare(mask, exhaustive=True).quotes
    return {(quote.candidate.layout, quote.candidate.method) for quote in quotes}


def test_what_is_given_is_kept() -> None:
    mask = MASKS["documents"]()
    assert {layout for layout, _ in _names(mask, layout="zigzag")} == {"zigzag"}
    assert {method for _, method in _names(mask, method="tile")} == {"tile"}
    striped = ra.layouts.striped(TOKENS, 16, stride=512)
    assert context(layout=striped).plan(mask).layout is striped
    staged = context(method="direct", options={"stages": 3}).compare(mask, exhaustive=True)
    assert all(dict(q.candidate.options) == {"stages": 3} for q in staged.quotes)


@pytest.mark.parametrize("name", MASKS)
def test_auto_is_within_three_per_cent_of_an_exhaustive_sweep(name: str) -> None:
    """Every layout in several chunks and groups, every method, degree and number of stages."""
    mask = MASKS[name]()
    cp = context(8, ranks_per_node=4)
    found = sweep(mask, cp.shapes, 8, load_cluster("h100_sxm"), 4)
    assert len(found) > 150
    assert cp.compare(mask).best.seconds <= 1.03 * found[0][0], found[0]


def test_open_settings_of_a_method_are_chosen_by_price() -> None:
    mask = MASKS["documents"]()
    cp = context(method="hybrid", layout="node_balanced")
    best, quotes = cp.compare(mask).best, cp.compare(mask, exhaustive=True).quotes
    assert len({q.candidate.u for q in quotes}) > 1
    assert len({dict(q.candidate.options)["stages"] for q in quotes}) > 1
    assert best.seconds == min(q.seconds for q in quotes)
    assert cp.plan(mask).digest == cp.plan(mask).digest
    assert cp.plan(mask).forward.digest == best.schedules[0].digest
    given = context(method="hybrid", layout="node_balanced", options={"u": 2})
    assert {q.candidate.u for q in given.compare(mask, exhaustive=True).quotes} == {2}


def test_wire_dtypes_are_weighed_on_request() -> None:
    mask = MASKS["causal"]()
    both = context(wire_dtype="auto", method="ring").compare(mask, exhaustive=True)
    assert {q.candidate.wire for q in both.quotes} == set(Wire)
    for wire, dtype in ((Wire.ACCUMULATOR, None), (Wire.INPUT, torch.bfloat16)):
        one = context(wire_dtype=dtype, method="ring").compare(mask).best
        assert one.seconds == min(q.seconds for q in both.quotes if q.candidate.wire == wire)
    with pytest.raises(UserError, match="needs a cluster"):
        context(cluster=None, wire_dtype="auto")


def test_refinement_never_slows_a_plan() -> None:
    mask = MASKS["blockwise"]()
    plain, refined = context().compare(mask).best, context(refine=6).compare(mask).best
    assert refined.seconds <= plain.seconds
    assert (refined.layout.sizes == plain.layout.sizes).all()
    if refined.seconds < plain.seconds:
        assert refined.candidate.layout == "refined"
    ra.verify(context(refine=3).plan(masks.causal_blockwise([300, 20, 200, 504])))


def test_layout_options_are_kept_to() -> None:
    mask = MASKS["blockwise"]()
    cp = context(layout="node_balanced", layout_options={"group": 2, "max_imbalance": 1.1})
    assert {q.candidate.layout_options for q in cp.compare(mask).quotes} == {
        (("group", 2), ("max_imbalance", 1.1))
    }
    assert cp.plan(mask).layout.sizes.max() <= 1.1 * TOKENS / 16 + 1
    without = context(cluster=None, layout="area_greedy", layout_options={"chunk": 256})
    assert without.plan(mask).layout.key == ra.layouts.area_greedy(mask, 16, 256).key
    for bad in ({"layout": "zigzag"}, {"layout": "auto"}, {"layout": "hybrid", "value": "x"}):
        with pytest.raises(UserError, match="layout_options"):
            context(layout=bad["layout"], layout_options={"chunk": bad.get("value", 4)})


def test_faster_links_change_the_choice_and_never_slow_it() -> None:
    mask, cluster = MASKS["causal"](), load_cluster("h100_sxm")
    slow = replace(cluster, inter=replace(cluster.inter, gbs=cluster.inter.gbs / 50))
    usual, starved = (context(cluster=c).compare(mask) for c in (cluster, slow))
    assert starved.best.seconds > usual.best.seconds
    assert starved.best.received[1].max() <= usual.best.received[1].max()


@pytest.mark.parametrize("world, node, heads", [(1, 1, 8), (6, 3, 8), (6, 4, 3), (16, 8, 1)])
def test_odd_groups_get_a_plan(world: int, node: int, heads: int) -> None:
    cp = context(world, heads=(2 * heads, heads), ranks_per_node=node)
    ra.verify(cp.plan(masks.causal(600)))


def test_candidates_name_known_methods_and_options() -> None:
    shapes = context(heads=(16, 16)).shapes
    found = candidates(shapes, 16, 8)
    assert len(set(found)) == len(found)
    assert {candidate.method for candidate in found} == set(AUTO_METHODS)
    for candidate in found:
        assert set(dict(candidate.options)) <= set(METHODS[candidate.method].options)


BAD = {"unknown": "h1000", "no cluster file": 3, "folder": "/"}


@pytest.mark.parametrize("case", BAD)
def test_bad_clusters_are_refused(case: str) -> None:
    with pytest.raises(UserError, match="cluster=") as caught:
        context(cluster=BAD[case])
    assert "\n" not in str(caught.value)


def test_prices_need_a_cluster() -> None:
    with pytest.raises(UserError, match="cluster=None"):
        context(cluster=None).compare(MASKS["causal"]())
    with pytest.raises(UserError, match="options"):
        context(cluster=None, options={"u": 2})
    assert context(options={"u": 2}).compare(MASKS["causal"]()).best


def test_timeline_and_trace(tmp_path: Any) -> None:
    best = context(32).compare(MASKS["documents"]()).best
    ranks = shown_ranks(best.priced)
    assert len(ranks) <= MOST_RANKS
    assert int(best.priced[1].rank_seconds.argmax()) in ranks
    draw_timeline(best.priced, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    events = chrome_trace(best.priced)["traceEvents"]
    assert {event["pid"] for event in events} == set(range(32))
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X"]
    assert max(ends) <= 1e6 * best.seconds * (1 + 1e-9)
