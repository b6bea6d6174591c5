"""Plans of every method: proved on integers; bytes, steps, stages and peak memory as promised."""

import itertools

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import Mask, PlanError, layouts, masks
from ringattn.methods import METHODS
from ringattn.schedule import Channel, Direction, Lane, Schedule
from ringattn.verify import verify_schedule
from tests.core.cases import BAND_MASKS, LAYOUTS, MASKS, METHOD_NAMES, mask_of, problem
from tests.core.handmade import travelling_queries

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


def _build(method: str, direction: Direction, mask: Mask, layout: ra.Layout, **changes) -> Schedule:
    posed = problem(mask, layout, method=method, **changes)
    generator = METHODS[method.partition(":")[0]]
    return (generator.forward if direction == "forward" else generator.backward)(posed)


def _schedules(method: str, mask: Mask, layout: ra.Layout, **changes) -> list[Schedule]:
    return [_build(method, direction, mask, layout, **changes) for direction in DIRECTIONS]


MASK_BLIND = ("all_gather", "ulysses", "usp", "loongtrain")  # their moves do not ask the mask


def _prove(mask_name: str, method: str, layout_names: list[str]) -> None:
    """Plans on these layouts; the number of ranks differs from mask to mask, method to method."""
    mask = mask_of(mask_name)
    turn = list(MASKS).index(mask_name) + METHOD_NAMES.index(method)
    for layout_name in layout_names:
        world = 1 + (turn + list(LAYOUTS).index(layout_name)) % 4
        layout = LAYOUTS[layout_name](mask, world)
        for schedule in _schedules(method, mask, layout, group=4 if world % 2 else 1):
            try:
                verify_schedule(schedule, mask, layout)
            except PlanError as error:
                raise AssertionError(f"{layout_name}, {world} ranks: {error}") from error


def _few_layouts(mask_name: str, method: str) -> list[str]:
    """Three layouts, which differ by mask and method so that all pairs meet."""
    names = list(LAYOUTS)
    turn = 2 * list(MASKS).index(mask_name) + METHOD_NAMES.index(method)
    return [names[(turn + index) % len(names)] for index in (0, 1, 4)]


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_plan_is_proved_on_integers(mask_name: str, method: str) -> None:
    _prove(mask_name, method, _few_layouts(mask_name, method))


def test_the_proved_plans_hold_all_pairs_and_rank_numbers() -> None:
    cases = set()
    for mask, method in itertools.product(MASKS, METHOD_NAMES):
        turn = list(MASKS).index(mask) + METHOD_NAMES.index(method)
        for layout in _few_layouts(mask, method):
            cases.add((mask, method, layout, (turn + list(LAYOUTS).index(layout)) % 4))
    axes = [list(MASKS), METHOD_NAMES, list(LAYOUTS), range(4)]
    for a, b in itertools.combinations(range(4), 2):
        assert {(c[a], c[b]) for c in cases} == set(itertools.product(axes[a], axes[b]))


@pytest.mark.full
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_plan_on_every_layout_is_proved_on_integers(mask_name: str, method: str) -> None:
    _prove(mask_name, method, list(LAYOUTS))


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_seven_ranks_and_fewer_tokens_than_ranks(method: str, layout_name: str) -> None:
    for mask, world in ((mask_of("documents_causal"), 7), (masks.causal(3), 5)):
        if layout_name == "uneven" and mask.seq_len < 5 * world:
            continue
        if method == "ulysses":
            continue  # has at most as many ranks as query heads
        layout = LAYOUTS[layout_name](mask, world)
        for schedule in _schedules(method, mask, layout):
            verify_schedule(schedule, mask, layout)


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_handmade_plan_is_proved(layout_name: str, world: int) -> None:
    mask = mask_of("streaming")
    layout = LAYOUTS[layout_name](mask, world)
    for direction in DIRECTIONS:
        schedule = travelling_queries(problem(mask, layout, group=4), direction)
        verify_schedule(schedule, mask, layout)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
def test_ring_bytes_follow_the_formula(world: int, group: int, wire_dtype: torch.dtype) -> None:
    """2(P-1)·u·Hkv·e forward, 2(P-1)·u·Hkv·(e+g) backward; u = n·D, full mask, equal shards."""
    n, heads, dim, e, g = 8, 4, 16, 2, wire_dtype.itemsize
    context = ra.ContextParallel(
        world,
        heads=(heads, heads // group),
        head_dim=dim,
        dtype=torch.bfloat16,
        method="ring",
        layout="contiguous",
        wire_dtype=wire_dtype,
    )
    plan = context.plan(masks.full(n * world))
    u, kv_heads = n * dim, heads // group
    for rank in range(world):
        assert plan.bytes(rank, "forward") == 2 * (world - 1) * u * kv_heads * e
        assert plan.bytes(rank, "backward") == 2 * (world - 1) * u * kv_heads * (e + g)


@pytest.mark.parametrize("window", [1, 2, 9, 17, 40, 200])
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
def test_direct_bytes_of_a_causal_window(window: int, wire_dtype: torch.dtype) -> None:
    """2·min(W-1, r·n)·Hkv·D·e forward on rank r of contiguous shards; backward times (e+g)/e."""
    world, n, kv_heads, dim, e, g = 4, 16, 2, 8, 2, wire_dtype.itemsize
    context = ra.ContextParallel(
        world,
        heads=(4, kv_heads),
        head_dim=dim,
        dtype=torch.bfloat16,
        method="direct",
        layout="contiguous",
        wire_dtype=wire_dtype,
    )
    plan = context.plan(masks.sliding_window(n * world, window - 1, 0))
    owed = np.zeros(world, dtype=int)  # gradient rows that return to each owner
    for rank in range(world):
        rows = min(window - 1, rank * n)
        assert plan.bytes(rank, "forward") == 2 * rows * kv_heads * dim * e
        first = rank * n - rows
        for owner in range(rank):
            owed[owner] += max(0, (owner + 1) * n - max(first, owner * n))
    for rank in range(world):
        rows = min(window - 1, rank * n)
        expected = 2 * kv_heads * dim * (rows * e + int(owed[rank]) * g)
        assert plan.bytes(rank, "backward") == expected
    total = sum(plan.bytes(rank, "forward") for rank in range(world))
    assert sum(plan.bytes(rank, "backward") for rank in range(world)) * e == total * (e + g)


@pytest.mark.parametrize("mask_name", BAND_MASKS)
def test_direct_moves_only_rows_that_are_attended(mask_name: str) -> None:
    """Where bands have gaps (step > 1), the rows inside a gap may travel too."""
    mask = mask_of(mask_name)
    layout = layouts.zigzag(mask.seq_len, 3)
    forward = _build("direct", "forward", mask, layout)
    for rank in range(3):
        mine = layout.positions(rank)
        needed = np.any(mask.dense()[mine], axis=0)
        needed = np.delete(needed, mine)
        moved = forward.moves["rows"][forward.moves["dst"] == rank].sum()
        if (mask.bands["step"] == 1).all():
            assert moved == needed.sum()
        assert moved >= needed.sum()


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_no_step_is_empty_and_no_move_is(method: str, layout_name: str) -> None:
    for mask_name in ("causal", "causal_window", "documents_causal"):
        mask = mask_of(mask_name)
        for schedule in _schedules(method, mask, LAYOUTS[layout_name](mask, 4)):
            used = {*schedule.tasks["step"], *schedule.moves["post"], *schedule.moves["land"]}
            assert used == set(range(schedule.nsteps))
            assert (schedule.moves["rows"] > 0).all()
            assert (schedule.tasks["area"] > 0).all()


@pytest.mark.parametrize("method", [m for m in METHOD_NAMES if m not in MASK_BLIND])
def test_one_rank_and_separate_documents_move_nothing(method: str) -> None:
    cut = masks.documents([16, 16, 16, 16], causal=True)
    cases = [(mask_of("causal"), layouts.zigzag(64, 1)), (cut, layouts.contiguous(64, 4))]
    for mask, layout in cases:
        for schedule in _schedules(method, mask, layout):
            assert not len(schedule.moves)
            assert schedule.nsteps == 1


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("mask_name", MASKS)
def test_the_work_of_all_ranks_is_the_mask(method: str, mask_name: str) -> None:
    """Blocks selected at run time are estimated: each tile's share is rounded up."""
    mask = mask_of(mask_name)
    for schedule in _schedules(method, mask, layouts.zigzag(mask.seq_len, 4)):
        want, spare = mask.area / mask.layers, len(schedule.tasks) if mask.routing else 0
        assert want - spare <= schedule.work.sum() * (1 + 1e-12)
        assert schedule.work.sum() <= (want + spare) * (1 + 1e-12)


def test_half_of_the_local_work_waits_for_the_last_step() -> None:
    """So that it hides the returning gradients; for one tile and for many."""
    for mask, layout in (
        (masks.full(64), layouts.contiguous(64, 4)),
        (masks.causal(64), layouts.zigzag(64, 4)),
        (masks.documents([5] * 8 + [24], causal=False), layouts.contiguous(64, 2)),
    ):
        for method in ("ring", "direct"):
            schedule = _build(method, "backward", mask, layout)
            tasks = schedule.tasks[schedule.tasks["kslot"] == 0]
            for rank in range(layout.world):
                mine = tasks[tasks["rank"] == rank]
                late = mine["area"][mine["step"] == schedule.nsteps - 1].sum()
                assert 0.25 <= late / mine["area"].sum() <= 0.75, (mask, method, rank)


def test_both_halves_write_results_of_their_own() -> None:
    """Other rows, or other heads: nothing has to be merged."""
    for mask, layout in (
        (masks.full(64), layouts.contiguous(64, 4)),
        (masks.documents([5] * 8 + [24], causal=False), layouts.contiguous(64, 2)),
    ):
        tasks = _build("direct", "backward", mask, layout).tasks
        home = tasks[tasks["kslot"] == 0]
        for rank in range(layout.world):
            mine = home[home["rank"] == rank]
            early, late = (mine[mine["step"] == s] for s in (0, mine["step"].max()))
            for a in early:
                rows = (a["q0"] < late["q1"]) & (late["q0"] < a["q1"])
                assert not (rows & (a["h0"] < late["h1"]) & (late["h0"] < a["h1"])).any()


def test_a_joined_forward_computes_each_query_in_one_launch() -> None:
    mask, layout = masks.sliding_window(64, 5, 0), layouts.contiguous(64, 4)
    plain, joined = (_build(m, "forward", mask, layout) for m in ("direct:1", "direct:1:join=1"))
    for schedule, launches in ((plain, 2), (joined, 1)):
        for row in range(4):  # the first queries of rank 1 have remote keys
            tasks = schedule.tasks[schedule.tasks["rank"] == 1]
            mine = tasks[(tasks["q0"] <= row) & (row < tasks["q1"])]
            assert len(np.unique(mine["kslot"])) == launches
    copies = joined.moves["src"] == joined.moves["dst"]
    assert copies.any()
    assert [joined.bytes(rank) for rank in range(4)] == [plain.bytes(rank) for rank in range(4)]
    assert _build("direct:1:join=1", "backward", mask, layout).digest == (
        _build("direct:1", "backward", mask, layout).digest
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hybrid_brings_half_of_the_heads_later_and_home_earlier(direction: Direction) -> None:
    mask, layout = masks.full(64), layouts.contiguous(64, 4)
    schedule = _build("hybrid", direction, mask, layout, group=2)
    verify_schedule(schedule, mask, layout)
    moves, last = schedule.moves, schedule.nsteps - 1
    queries = moves[(moves["channel"] == Channel.Q) & (moves["dslot"] == 1)]
    assert set(queries["post"].tolist()) == {0, 1}
    result = Channel.O if direction == "forward" else Channel.DQ
    results = moves[(moves["channel"] == result) & (moves["dslot"] == 0)]
    assert set(results["post"].tolist()) == {last - 1, last}


@pytest.mark.parametrize("slack", [1, 10, 100])
def test_hybrid_keeps_private_work_even(slack: int) -> None:
    """No rank computes more at home than its head group's mean and the slack."""
    mask = masks.documents([8, 8, 4, 4, 4, 4, 2, 2, 2, 2, 12, 12], causal=True)
    layout = layouts.hybrid(mask, 4, 2)
    schedule = _build("hybrid", "forward", mask, layout, options={"slack": slack})
    verify_schedule(schedule, mask, layout)
    home = schedule.tasks[schedule.tasks["qslot"] == 0]
    load = np.bincount(home["rank"], weights=home["area"], minlength=4).reshape(2, 2)
    excess = (load - load.mean(axis=1, keepdims=True)).max()
    assert excess <= slack / 100 * mask.area / 4


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_direct_cuts_what_a_rank_receives_into_that_many_stages(stages: int) -> None:
    mask, layout = masks.full(64), layouts.contiguous(64, 4)
    for direction in DIRECTIONS:
        schedule = _build(f"direct:{stages}", direction, mask, layout)
        verify_schedule(schedule, mask, layout)
        moves = schedule.moves[schedule.moves["channel"] == Channel.K]
        for rank in range(4):
            mine = moves[moves["dst"] == rank]
            per_stage = [mine["rows"][mine["post"] == s].sum() for s in np.unique(mine["post"])]
            assert len(per_stage) == stages
            assert max(per_stage) - min(per_stage) <= 48 % stages + 48 // stages
            assert sum(per_stage) == 48
            assert max(per_stage) == -(-48 // stages)


def test_direct_sends_to_one_receiver_at_a_time_on_dense_masks() -> None:
    """As a ring does: no rank fans one block out to everybody in one step."""
    schedule = _build("direct", "forward", masks.full(128), layouts.contiguous(128, 8))
    posts = np.stack([schedule.moves["post"], schedule.moves["src"]], axis=1)
    assert np.unique(posts, axis=0, return_counts=True)[1].max() == 1


def test_direct_needs_at_most_twice_the_memory_of_ring_on_dense_causal() -> None:
    mask = masks.causal(64 * 128)
    for layout in (layouts.contiguous(mask.seq_len, 64), layouts.zigzag(mask.seq_len, 64)):
        for direction in DIRECTIONS:
            peaks = {}
            for method in ("ring", "direct"):
                schedule = _build(method, direction, mask, layout)
                peaks[method] = max(schedule.peak_bytes(rank) for rank in range(64))
            assert peaks["direct"] <= 2 * peaks["ring"], (layout.name, direction, peaks)


def test_moves_know_their_lane() -> None:
    schedule = _build(
        "ring", "forward", masks.full(64), layouts.contiguous(64, 4), ranks_per_node=2
    )
    same_node = schedule.moves["src"] // 2 == schedule.moves["dst"] // 2
    assert (same_node == (schedule.moves["lane"] == Lane.INTRA)).all()
    for rank in range(4):
        by_lane = [schedule.bytes(rank, lane) for lane in Lane]
        assert sum(by_lane) == schedule.bytes(rank)
    assert schedule.bytes(1, Lane.INTER) == 0
    assert schedule.bytes(2, Lane.INTRA) == 0


def test_a_million_tokens_make_small_tables() -> None:
    """Planning stays cheap because tables grow with documents and ranks, not with tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.5, 1.2, 600).astype(int) + 1
    lengths = lengths * 2**20 // lengths.sum() + 1
    lengths[-1] += 2**20 - lengths.sum()
    mask = masks.documents(lengths.tolist(), causal=True)
    layout = layouts.area_greedy(mask, 64)
    for method in sorted(set(METHODS) - {"ulysses"}):  # the heads here do not suffice for 64 ranks
        for schedule in _schedules(method, mask, layout):
            assert schedule.work.sum() == pytest.approx(mask.area, rel=1e-12)
            assert len(schedule.tasks) < 20 * (len(lengths) + 64 * 8)
            assert len(schedule.moves) < 20 * (len(lengths) + 64 * 64)


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_builds_the_same_plan(method: str) -> None:
    mask = mask_of("documents_causal")
    built = [_schedules(method, mask, layouts.zigzag(mask.seq_len, 4)) for _ in range(2)]
    for one, other in zip(*built, strict=True):
        assert one.digest == other.digest
        assert (one.tasks == other.tasks).all()


def test_the_digest_tells_plans_apart() -> None:
    mask, other = mask_of("causal"), masks.sliding_window(64, 40, 0)
    layout = layouts.zigzag(64, 4)
    digests = {
        _build("ring", "forward", mask, layout).digest,
        _build("ring", "backward", mask, layout).digest,
        _build("direct", "forward", mask, layout).digest,
        _build("ring", "forward", other, layout).digest,
        _build("ring", "forward", mask, layouts.contiguous(64, 4)).digest,
        _build("ring", "forward", mask, layout, group=4).digest,
        _build("ring", "forward", mask, layout, ranks_per_node=1).digest,
    }
    assert len(digests) == 7


def test_schedules_cannot_be_written_to() -> None:
    schedule = _build("ring", "forward", mask_of("causal"), layouts.zigzag(64, 4))
    for table in (schedule.tasks, schedule.moves):
        with pytest.raises(ValueError, match="read-only"):
            table["rank"] = 0
