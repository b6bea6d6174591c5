"""Prices of ranks that share CPU cores: calls as the kernel makes them, and hand-computed steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.cost import Curve, Link, OnCores, dump_cluster, parse_cluster, price, survey
from ringattn.cost.cut_load import cut_load
from ringattn.cost.host_work import host_work
from ringattn.errors import UserError
from ringattn.kernels.cpu_flash import CpuFlashKernel
from ringattn.schedule import Lane, Schedule, tiles_of
from tests.core.test_cost import SHAPES, cluster
from tests.core.test_cost import handmade as blockless

ONE_CALL = Curve(tflops=1e-6, block_rows=1, block_keys=1, cut="cpu_flash")  # 1e6 FLOP/s
FREE = OnCores(cores=2, copy_gbs=1e6, add_gbs=1e6, carry_gbs=1e-3, run_gbs=1e6)


def handmade(lane: Lane = Lane.INTRA) -> Schedule:
    """`tests.core.test_cost.handmade` of plain bands."""
    made = blockless(lane)
    made.tasks["matrix"] = -1
    return made


def plan_of(mask: ra.masks.Mask, method: str = "ring", world: int = 2) -> ra.Plan:
    """A plan of float32 attention with 4 query and 2 key heads of dim 8."""
    return ra.ContextParallel(
        world, heads=(4, 2), head_dim=8, dtype=torch.float32, method=method
    ).plan(mask)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_calls_are_those_that_the_kernel_makes(method, direction):
    schedule = plan_of(ra.masks.documents([300, 20, 180, 140], causal=True), method).schedule(
        direction
    )
    load = cut_load(schedule, "cpu_flash")
    for step in range(schedule.nsteps):
        for rank in range(schedule.world):
            tasks = schedule.tasks
            mine = tasks[(tasks["step"] == step) & (tasks["rank"] == rank)]
            slots: list[str] = ["qslot", "kslot", "oslot", "gslot"]
            calls = [
                call
                for key in np.unique(mine[slots])
                for call in getattr(
                    CpuFlashKernel().prepare(
                        tiles_of(mine[mine[slots] == key]), torch.device("cpu")
                    ),
                    direction,
                )
            ]
            flops = 4 * 8 if direction == "forward" else 10 * 8
            pairs = sum(c.count * c.rows * c.keys * (c.h1 - c.h0) for c in calls)
            assert load.pairs[step, rank] == pairs * flops
            assert load.tiles[step, rank] >= len(calls)
            assert load.masks[step, rank] == sum(
                c.mask.numel() for c in calls if c.mask is not None
            )


def test_products_of_block_matrices_are_counted_apart():
    allowed = np.eye(4, dtype=bool)
    mask = ra.masks.blocks(allowed, 32, 32)
    load = cut_load(plan_of(mask, world=1).forward, "cpu_flash")
    assert load.matrix.sum() == 4 * 32 * 32 * 4 * (4 * 8)  # pairs, heads, FLOPs of a pair
    assert load.products.sum() == 4
    assert load.pairs.sum() == load.tiles.sum() == 0


def test_ranks_share_cores_and_messages_take_them():
    """`handmade`: rank 0 computes 100 pairs, rank 1 200 and then 100 more, on 4 heads of 32 FLOPs
    each; 100 rows of 2 heads of 2 x 8 numbers of 2 bytes travel: 6.4 ms of CPU time at either end.
    """
    kernel = [100 * 4 * 32 * 1e-6, 200 * 4 * 32 * 1e-6]  # 12.8 and 25.6 ms
    carry = 6400 * 1e-6
    four = cluster(ONE_CALL, on_cores=replace(FREE, cores=4))
    assert price(handmade(), four).seconds == pytest.approx(kernel[1] + kernel[0], rel=1e-6)
    # One core: everything is done one after another, whoever does it, until rank 1 alone is left.
    one = cluster(ONE_CALL, on_cores=replace(FREE, cores=1))
    priced = price(handmade(), one)
    assert priced.seconds == pytest.approx(kernel[0] + kernel[1] + 2 * carry + kernel[0], rel=1e-6)
    assert priced.carrying is not None
    assert priced.carrying == pytest.approx([carry, carry])
    # Two cores, four threads at first: 12.8 ms until both carriers are done, each at half speed.
    two = price(handmade(), cluster(ONE_CALL, on_cores=FREE))
    assert two.done[0] == pytest.approx(2 * carry, rel=1e-6)
    # Then rank 0 has 6.4 ms left and rank 1 19.2, on a core each.
    assert two.rank_seconds[0] == pytest.approx(2 * carry + kernel[0] - carry, rel=1e-6)
    assert two.seconds == pytest.approx(2 * carry + kernel[1] - carry + kernel[0], rel=1e-6)


def test_latency_and_the_wire_take_no_core():
    slow = cluster(
        ONE_CALL, on_cores=FREE, ranks_per_node=1, nics_per_node=1,
        inter=Link(gbs=1e-4, latency_us=1000.0),
    )  # fmt: skip
    priced = price(handmade(Lane.INTER), slow)
    assert priced.sent[0] == pytest.approx(1e-3)
    # 64 ms on the wire and its latency, after both ends have posted; then rank 1 computes.
    assert priced.seconds == pytest.approx(1e-3 + 65e-3 + 100 * 4 * 32e-6, rel=1e-6)


def test_what_the_executor_does_is_priced():
    costs = replace(FREE, cores=8, run_us=100.0, step_us=10.0, message_us=20.0, part_us=5.0)
    free = price(handmade(), cluster(ONE_CALL, on_cores=replace(FREE, cores=8)))
    dear = price(handmade(), cluster(ONE_CALL, on_cores=costs))
    # Rank 0 packs a part and posts it; rank 1 posts and lands it; both begin a run and two steps.
    assert dear.copies - free.copies == pytest.approx([145e-6, 145e-6])
    work = host_work(handmade())
    assert work.packed.sum() == work.written.sum() == 6400
    assert work.made == pytest.approx([r * 4 * 8 * 4 for r in handmade().home_rows])


def test_clusters_without_shared_cores_are_priced_as_before():
    schedule = plan_of(ra.masks.causal(256)).forward
    plain = survey(schedule, 32, 32)
    assert plain.host is None
    for name in ("masks", "matrix", "products"):
        assert not getattr(plain.load, name).any()


def test_a_file_with_shared_cores_is_read_and_checked():
    made = cluster(ONE_CALL, on_cores=FREE)
    assert parse_cluster(dump_cluster(made), "test") == made
    assert "on_cores" not in dump_cluster(cluster())
    text = dump_cluster(made).replace("carry_gbs: 0.001", "carry_gbs: 0")
    with pytest.raises(UserError, match=r"on_cores\.carry_gbs=0"):
        parse_cluster(text, "test")
    with pytest.raises(UserError, match="cut='other'"):
        price(handmade(), cluster(replace(ONE_CALL, cut="other")))


def test_shapes_of_the_hand_computed_plan():
    assert (SHAPES.q_heads, SHAPES.kv_heads, SHAPES.qk_dim, SHAPES.itemsize) == (4, 2, 8, 2)
