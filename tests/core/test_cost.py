"""Pricing: a hand-computed example, limits in which the price is known, units and order."""

from dataclasses import replace

import numpy as np
import pytest

import ringattn as ra
from ringattn import layouts, masks
from ringattn.cost import (
    Cluster,
    Curve,
    Kernel,
    Link,
    peak_bytes,
    price,
    survey,
)
from ringattn.cost.kernel_time import load_of, rounded_area
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.schedule import MOVE, SLOT, TASK, Channel, Lane, Op, Schedule, Shapes, bands_of
from tests.core.cases import problem

SHAPES = Shapes(
    q_heads=4, kv_heads=2, qk_dim=8, v_dim=8, itemsize=2, accumulator_itemsize=4
)  # fmt: skip
LENGTHS = (300, 20, 500, 1, 203)
EXACT = Curve(tflops=1e-6, block_rows=1, block_keys=1)  # 1e6 FLOP/s, no rounding, no overhead


def cluster(curve: Curve = EXACT, **changes) -> Cluster:
    """A cluster with free memory and links of 1 MB/s (intra) and 0.1 MB/s (inter)."""
    values = {
        "name": "test", "peak_tflops": 1.0, "ranks_per_node": 2, "nics_per_node": 2,
        "memory_gib": 1.0, "memory_gbs": 1e9, "cores": 1, "intra": Link(gbs=1e-3),
        "inter": Link(gbs=1e-4), "kernel": "k",
        "kernels": {"k": Kernel(forward=curve, backward=curve)},
    }  # fmt: skip
    return Cluster(**(values | changes))


def schedules(method: str, layout: str, mask: ra.masks.Mask, world: int) -> list[Schedule]:
    """Both directions of a method."""
    where = layouts.by_name(layout, mask, world, 2)
    problem = Problem(mask=mask, layout=where, shapes=SHAPES, ranks_per_node=2)
    return [METHODS[method].forward(problem), METHODS[method].backward(problem)]


def handmade(lane: Lane = Lane.INTRA) -> Schedule:
    """Rank 0 sends 100 rows of keys to rank 1 during step 0, which attends them in step 1.

    Step 0: rank 0 computes 10 x 10 pairs, rank 1 20 x 10 pairs. Step 1: rank 1 10 x 10 pairs.
    """
    tasks = np.zeros(3, dtype=TASK)
    tasks["step"], tasks["rank"] = [0, 0, 1], [0, 1, 1]
    tasks["q1"], tasks["k1"], tasks["stride"] = [10, 20, 10], 10, 1
    tasks["h1"], tasks["lo"], tasks["hi"] = 4, -100, 100
    tasks["kslot"] = [0, 0, 1]
    tasks["area"] = [100, 200, 100]
    moves = np.zeros(1, dtype=MOVE)
    moves["dst"], moves["channel"], moves["dslot"], moves["rows"] = 1, Channel.K, 1, 100
    moves["nheads"], moves["op"], moves["lane"] = 2, Op.SET, lane
    return Schedule(
        direction="forward", world=2, nsteps=2, home_rows=np.array([100, 100]), tasks=tasks,
        moves=moves, slots=np.zeros(0, dtype=SLOT), shapes=SHAPES,
    )  # fmt: skip


def test_handmade_schedule_has_the_price_computed_by_hand():
    # 4 heads x 32 FLOPs per pair at 1e6 FLOP/s: 12.8 ms per 100 pairs.
    # 100 rows x 2 heads x 16 elements x 2 bytes = 6,400 bytes: 6.4 ms inside a node, 64 between.
    priced = price(handmade(), cluster())
    np.testing.assert_allclose(priced.rank_seconds, [0.0128, 0.0384])
    assert priced.exposed.max() == pytest.approx(0.0, abs=1e-12)
    slow = price(handmade(Lane.INTER), cluster())
    np.testing.assert_allclose(slow.rank_seconds, [0.0128, 0.064 + 0.0128])
    np.testing.assert_allclose(slow.exposed, [0.0, 0.064 - 0.0256])
    np.testing.assert_allclose(slow.begin[:, 1], [0.0, 0.064])
    np.testing.assert_array_equal(slow.received, [[0, 0], [0, 6400]])
    assert slow.flops == 400 * 4 * 32
    assert slow.tflops_per_rank == pytest.approx(400 * 4 * 32 / (2e12 * 0.0768))


def test_latency_launches_merges_and_tax_add_what_they_say():
    base = price(handmade(), cluster()).seconds
    latency = cluster(intra=Link(gbs=1e-3, latency_us=30_000))
    assert price(handmade(), latency).seconds == pytest.approx(0.0364 + 0.0128)
    launch = cluster(replace(EXACT, launch_us=1000, tile_us=500))
    assert price(handmade(), launch).seconds == pytest.approx(base + 2 * 0.0015)
    # Rank 1's second launch adds 10 rows x 4 heads x 8 elements to earlier results.
    merge = cluster(replace(EXACT, result_bytes=10), memory_gbs=1e-3)
    assert price(handmade(), merge).seconds == pytest.approx(base + 3200e-6)
    # The message takes half the speed away for its 6.4 ms.
    taxed = cluster(overlap_tax=0.5)
    assert price(handmade(), taxed).seconds == pytest.approx(base + 0.0032)


def test_ranks_that_share_a_nic_share_its_bandwidth():
    mask = ra.masks.full(64)
    forward, _ = schedules("all_gather", "contiguous", mask, 4)
    own = cluster(kernels={"k": Kernel(forward=replace(EXACT, tflops=1e6), backward=EXACT)})
    shared = replace(own, nics_per_node=1)
    assert price(forward, shared).seconds == pytest.approx(
        2 * price(forward, own).seconds, rel=1e-3
    )


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "area_greedy"])
def test_price_without_communication_is_the_compute_of_the_slowest_rank(method, layout):
    mask = ra.masks.documents(LENGTHS, causal=True)
    free = cluster(intra=Link(gbs=1e15), inter=Link(gbs=1e15), memory_gbs=1e15)
    for schedule in schedules(method, layout, mask, 4):
        priced = price(schedule, free)
        work = survey(schedule, 1, 1).load.pairs / 1e6
        steps = np.cumsum(work, axis=0)[-1]
        assert priced.seconds >= steps.max() * (1 - 1e-9)
        np.testing.assert_allclose(priced.compute, steps)
        # Nobody waits for more than the others' work.
        assert priced.seconds <= work.max(axis=1).sum() * (1 + 1e-9)
        if not len(schedule.moves):
            assert priced.seconds == pytest.approx(steps.max())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_price_is_deterministic_and_never_slower_with_faster_links(method):
    mask = ra.masks.causal(1024)
    for schedule in schedules(method, "zigzag", mask, 4):
        slow = price(schedule, cluster())
        again = price(schedule, cluster())
        assert slow.seconds == again.seconds
        np.testing.assert_array_equal(slow.done, again.done)
        fast = cluster(intra=Link(gbs=2e-3), inter=Link(gbs=2e-4))
        assert price(schedule, fast).seconds <= slow.seconds * (1 + 1e-12)
        lagging = cluster(intra=Link(gbs=1e-3, latency_us=500))
        assert price(schedule, lagging).seconds >= slow.seconds * (1 - 1e-12)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("layout", ["contiguous", "striped", "area_greedy"])
def test_bytes_area_and_memory_are_the_schedules_own(method, layout):
    mask = ra.masks.documents(LENGTHS, causal=True)
    for schedule in schedules(method, layout, mask, 4):
        priced = price(schedule, cluster())
        for rank in range(4):
            for lane in Lane:
                assert priced.received[lane, rank] == schedule.bytes(rank, lane)
        np.testing.assert_array_equal(
            peak_bytes(schedule), [schedule.peak_bytes(rank) for rank in range(4)]
        )
        flops = 32 if schedule.direction == "forward" else 80
        assert priced.flops == mask.area * SHAPES.q_heads * flops


def test_messages_wait_for_both_ranks_and_take_their_time():
    mask = ra.masks.causal(1024)
    for schedule in schedules("ring", "contiguous", mask, 4):
        priced = price(schedule, cluster())
        moves = schedule.moves
        assert (priced.done > priced.sent).all()
        assert priced.nbytes.sum() == schedule.move_bytes.sum()
        assert priced.sent.min() >= 0
        assert len(priced.src) <= len(moves)
        rate = np.where(priced.lane == Lane.INTRA, 1e6, 1e5)
        assert (priced.done - priced.sent >= priced.nbytes / rate * (1 - 1e-9)).all()


def test_trace_has_complete_events_of_all_work_and_messages():
    priced = price(handmade(), cluster())
    events = priced.trace()
    assert {e["ph"] for e in events} == {"X"}
    assert sum(e["dur"] for e in events if e["tid"] == "compute") == pytest.approx(51_200)
    assert sum(e["dur"] for e in events if e["tid"] == "intra") == pytest.approx(6_400)


@pytest.mark.parametrize("seed", [3, 4])
def test_rounded_area_holds_the_exact_area_and_grows_with_blocks(seed):
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 400, 20)]
    for mask in (
        ra.masks.documents(lengths, causal=True),
        ra.masks.sliding_window(sum(lengths), 100, 3),
        ra.masks.full(sum(lengths)),
    ):
        forward, _ = schedules("ring", "zigzag", mask, 2)
        bands = bands_of(forward.tasks)
        exact = rounded_area(bands, 1, 1)
        np.testing.assert_array_equal(exact, forward.tasks["area"])
        medium, large = rounded_area(bands, 32, 32), rounded_area(bands, 128, 128)
        assert (medium >= exact).all()
        assert (large >= medium).all()


def test_rounded_area_of_a_causal_square_is_its_block_triangle():
    forward, _ = schedules("ring", "contiguous", ra.masks.causal(1024), 1)
    # 8 x 9 / 2 blocks of 128 x 128 touch the triangle.
    assert rounded_area(bands_of(forward.tasks), 128, 128)[0] == pytest.approx(
        36 * 128 * 128, rel=0.02
    )


def test_rows_and_heads_that_nobody_wrote_need_no_merge() -> None:
    """A launch that writes other rows, or other heads, than earlier ones adds to nothing."""
    mask, layout = masks.full(64), layouts.contiguous(64, 1)
    schedule = METHODS["direct"].forward(problem(mask, layout))
    (task,) = schedule.tasks
    step = {"step": 1}
    cuts = {
        "rows": [{"q1": 32}, step | {"q0": 32}],
        "heads": [{"h1": 2}, step | {"h0": 2}],
        "keys": [{"k1": 32}, step | {"k0": 32}],
    }
    merged = {}
    for name, parts in cuts.items():
        tasks = np.array([task, task])
        for row, part in zip(tasks, parts, strict=True):
            for column, value in part.items():
                row[column] = value
        load = load_of(replace(schedule, tasks=tasks, nsteps=2), 16, 16)
        merged[name] = load.merged.sum()
    assert merged["rows"] == merged["heads"] == 0
    assert merged["keys"] == 64 * schedule.shapes.q_heads * schedule.shapes.v_dim
