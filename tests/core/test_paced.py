"""One rank of many: what arrives, in which order and by when. Clocks are fake: nothing is timed."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ringattn as ra
from ringattn.arena import Arena
from ringattn.benchmarks.one_rank_price import predict, timings_of
from ringattn.cost import load_cluster, price_pair
from ringattn.executor import Run, forward_home
from ringattn.parallel.paced import (
    PIECE,
    Arrival,
    HostCarrier,
    PacedFabric,
    Piece,
    Timing,
    pieces,
    random_bytes,
)
from ringattn.schedule import Channel, Lane, Schedule
from tests.core.cases import inputs_of, plan_of

CPU = torch.device("cpu")


class _Clock:
    """Time passes only where somebody waits for it; `waits` are the seconds waited for."""

    def __init__(self) -> None:
        self.second, self.waits = 100.0, []

    def now(self) -> float:
        return self.second

    def until(self, second: float) -> None:
        self.waits.append(second)
        self.second = max(self.second, second)


def test_pieces_are_evenly_paced() -> None:
    timing = Timing(first=1.0, last=3.0)
    assert pieces([4, 0, 6], timing, most=3) == [
        Piece(0, 0, 3, 1.6),
        Piece(0, 3, 4, 1.8),
        Piece(2, 0, 3, 2.4),
        Piece(2, 3, 6, 3.0),
    ]
    assert pieces([], timing) == pieces([0], timing) == [Piece(0, 0, 0, 3.0)]


def test_pieces_cover_every_byte_and_end_in_time(generator: torch.Generator) -> None:
    for _ in range(50):
        sizes = torch.randint(0, 40, (5,), generator=generator).tolist()
        first, gap, most = torch.randint(1, 9, (3,), generator=generator).tolist()
        found = pieces(sizes, Timing(first, first + gap), most)
        covered = [(p.message, byte) for p in found for byte in range(p.start, p.stop)]
        assert covered == [(m, byte) for m, size in enumerate(sizes) for byte in range(size)]
        assert all(p.stop - p.start <= most for p in found)
        dues = [p.due for p in found]
        assert dues == sorted(dues)
        assert dues[-1] == pytest.approx(first + gap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_arrives_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    numbers = random_bytes(1 << 16, CPU).view(dtype)
    assert numbers.isfinite().all()
    assert numbers.abs().max() < 1000
    assert numbers.unique().numel() > 256


def _carry(carrier: HostCarrier, sizes: Sequence[int], timing: Timing) -> list[torch.Tensor]:
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    plan = pieces(sizes, timing, most=8)
    carrier.carry(0, [torch.ones(5)], targets, plan, timing.start).wait()
    return targets


def test_a_lane_keeps_the_pace_and_its_order() -> None:
    clock = _Clock()
    carrier = HostCarrier(clock)
    carrier.begin()
    first = _carry(carrier, [8, 8], Timing(2.0, 6.0))
    _carry(carrier, [], Timing(1.0, 5.0))  # sends hold the lane as well
    _carry(carrier, [4], Timing(1.0, 2.0, start=20.0))
    assert clock.waits == [
        100.0, 104.0, 106.0,  # at once; 2 s of latency, then 8 bytes in 2 s
        100.0, 111.0,
        120.0, 122.0,  # its peers are ready 20 s after the run began
    ]  # fmt: skip
    assert carrier.seconds() == [6.0, 5.0, 2.0]
    assert carrier.seconds() == []
    source = random_bytes(PIECE, CPU)[:8]
    assert all(torch.equal(target, source) for target in first)


def test_messages_longer_than_a_piece_are_filled() -> None:
    target = torch.zeros(PIECE + 10, dtype=torch.uint8)
    fabric = PacedFabric(0, 2, {3: Timing(0.0, 1.0)}, HostCarrier(_Clock()))
    fabric.exchange([], [(1, target)], lane=1, long=True, tag=3).wait()
    source = random_bytes(PIECE, CPU)
    assert torch.equal(target[:PIECE], source)
    assert torch.equal(target[PIECE:], source[:10])
    assert fabric.arrivals() == [Arrival(3, 1, PIECE + 10, 1.0, 1.0)]
    fabric.exchange([], [], lane=0, long=False, tag=9).wait()
    assert fabric.arrivals() == []


METHODS = ["ring", "double_ring", "direct:3", "usp:u=2", "tile:tile_a=2", "burst", "hybrid"]


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_can_be_played(method: str) -> None:
    """All that the plan says arrives, each batch in its time, and results are numbers."""
    case = {
        "mask": "documents_causal", "layout": "zigzag", "method": method, "world": 8,
        "heads": "8:2", "batch": 1, "kernel": "matmul", "node": 4,
    }  # fmt: skip
    plan, x, cluster = plan_of(case), inputs_of(case), load_cluster("h100_sxm")
    priced, _ = price_pair((plan.forward, plan.backward), cluster)
    for rank in range(plan.world):
        timings = timings_of(plan.forward, priced, rank, cluster)
        fabric = PacedFabric(rank, plan.world, timings, HostCarrier(_Clock()))
        q, k, v = (plan.shard(t, rank=rank) for t in (x.q, x.k, x.v))
        home = forward_home(q, k, v, None)
        program = plan.program("forward", rank, "matmul", CPU)
        run = Run(program, fabric, Arena(), home, 0.3, None)
        fabric.open(program.classes)
        run.execute()
        assert all(t.isfinite().all() for t in run.slots[Channel.O, 0])
        assert fabric.received_bytes == plan.bytes(rank, "forward")
        arrivals = fabric.arrivals()
        assert {a.tag for a in arrivals} == timings.keys()
        assert sum(a.nbytes for a in arrivals) == fabric.received_bytes
        assert all(a.asked > 0 for a in arrivals)


def _ring() -> tuple[ra.Plan, Schedule]:
    """A ring of four ranks on two nodes: each passes its k and v on, three times."""
    context = ra.ContextParallel(
        4, heads=(4, 2), head_dim=16, dtype=torch.float32, method="ring", layout="contiguous",
        ranks_per_node=2,
    )  # fmt: skip
    plan = context.plan(ra.masks.full(256))
    return plan, plan.forward


def test_timings_follow_the_cluster_file() -> None:
    plan, forward = _ring()
    cluster = load_cluster("h100_sxm")
    one = replace(cluster, ranks_per_node=2, nics_per_node=2)
    priced, _ = price_pair((plan.forward, plan.backward), one)
    nbytes = 2 * 64 * 2 * 16 * 4
    program = plan.program("forward", 1, "matmul", CPU)
    timings = timings_of(forward, priced, 1, one)
    exchanges = {e.tag: (index, e) for index, s in enumerate(program.steps) for e in s.posts}
    assert timings.keys() == exchanges.keys()
    assert {Lane(e.lane) for _, e in exchanges.values()} == set(Lane)
    for tag, (step, exchange) in exchanges.items():
        link = one.intra if exchange.lane == Lane.INTRA else one.inter
        assert timings[tag].first == pytest.approx(1e-6 * link.latency_us)
        wire = nbytes / (1e9 * link.gbs) + 1e-6 * link.latency_us
        assert timings[tag].last == pytest.approx(wire)
        # It receives from rank 0 of its node and sends to rank 2 of the other.
        peer = 0 if exchange.lane == Lane.INTRA else 2
        assert timings[tag].start == pytest.approx(priced.begin[step, peer])
    assert max(t.start for t in timings.values()) > 0


def test_the_prediction_is_the_planners() -> None:
    plan, forward = _ring()
    cluster = load_cluster("h100_sxm")
    priced, _ = price_pair((plan.forward, plan.backward), cluster)
    found = [predict(forward, priced, rank, cluster, None) for rank in range(4)]
    assert [p.seconds for p in found] == priced.rank_seconds.tolist()
    assert sum(p.flops for p in found) == pytest.approx(priced.flops)
    assert sum(p.flops for p in found) == 4 * 16 * 4 * 256 * 256
    assert all(p.compute <= seconds for p, seconds in zip(found, priced.compute, strict=True))


def check_clock_kernels(arch: int) -> None:
    """Compiles the clock's kernels; in a process that does not interpret them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ringattn.parallel import device_clock

    kernels = (
        (device_clock._stamp, {"row": "*i64"}, 1),
        (device_clock._hold, {"row": "*i64", "nanoseconds": "i32"}, 2),
    )
    for kernel, signature, reads in kernels:
        source = ASTSource(fn=kernel, signature=signature, constexprs={})
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 1})
        assert made.asm["ptx"].count("%globaltimer") == reads
        assert made.metadata.shared == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_clock_kernels_compile_and_need_no_shared_memory(arch: int) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    call = f"from tests.core.test_paced import check_clock_kernels as check; check({arch})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_gpu_holds_messages_back_until_they_are_due() -> None:
    from ringattn.parallel.paced_cuda import CudaCarrier

    device = torch.device("cuda", torch.cuda.current_device())
    timings = {tag: Timing(1e-4, 2e-3, start=5e-3 * tag) for tag in range(4)}
    fabric = PacedFabric(0, 2, timings, CudaCarrier(device, (Lane.INTER,)))
    fabric.open([])
    source = random_bytes(PIECE, CPU)
    targets = [torch.zeros(PIECE + 64, dtype=torch.uint8, device=device) for _ in timings]
    sent = torch.ones(1 << 20, dtype=torch.uint8, device=device)
    handles = [
        fabric.exchange([(1, sent)], [(1, target)], lane=tag % 2, long=False, tag=tag)
        for tag, target in enumerate(targets)
    ]
    for handle, target in zip(handles, targets, strict=True):
        handle.wait()
        copied = target.clone()  # on the stream that has waited
        assert torch.equal(copied[:PIECE].cpu(), source)
        assert torch.equal(copied[PIECE:].cpu(), source[:64])
    for arrival in fabric.arrivals():
        assert arrival.achieved >= arrival.asked


def test_the_slower_lane_is_posted_first_and_classes_keep_their_order() -> None:
    case = {
        "mask": "full", "layout": "zigzag", "method": "double_ring", "world": 8, "heads": "8:2",
        "batch": 1, "kernel": "matmul", "node": 4,
    }  # fmt: skip
    plan = plan_of(case)
    both = 0
    for rank in range(plan.world):
        steps = plan.program("forward", rank, "matmul", CPU).steps
        for step in steps:
            lanes = [exchange.lane for exchange in step.posts]
            assert lanes == sorted(lanes, reverse=True)
            both += len(set(lanes)) == 2
        posted = [exchange for step in steps for exchange in step.posts]
        for kind in {(e.lane, e.long) for e in posted}:
            tags = [e.tag for e in posted if (e.lane, e.long) == kind]
            assert tags == sorted(tags)
    assert both > 0
