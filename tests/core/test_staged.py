"""Messages staged through host memory: real gloo ranks, as on a GPU that they share.

On the CPU a copy is done when it returns. `_LateCopies` puts every copy off until something waits
for it, as a stream may, so that whoever forgets to wait reads what is not there yet.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.errors import UserError
from ringattn.parallel.fabric import backend_of
from ringattn.parallel.staged import HostCopies, StagedFabric, check_staging
from tests.closeness import rel_error
from tests.core.cases import AXES, Case, plan_of, reference_of
from tests.core.exactness import assert_exact
from tests.core.gloo import Results, run_case, run_cases
from tests.pairwise import pairwise
from tests.ranks import RankPool, run_ranks

NODES = [
    {"method": "double_ring", "layout": "zigzag", "world": 4, "node": 2},
    {"method": "double_ring", "layout": "scattered", "world": 4, "node": 1},
    {"method": "direct:3", "layout": "area_greedy", "world": 4, "node": 2},
    {"method": "usp:u=2", "layout": "zigzag", "world": 4, "node": 2},
    {"method": "hybrid", "layout": "hybrid", "world": 4, "node": 2},
    {"method": "tile:tile_a=2", "layout": "striped", "world": 4, "node": 2},
    {"method": "burst", "layout": "zero_tokens", "world": 3, "node": 1},
]
"""Plans with both lanes; the double ring's moves over nodes outlive a step."""


class _LateCopies(HostCopies):
    """Makes a copy when its end is waited for, and host buffers of rubbish."""

    def __init__(self) -> None:
        self._lock = Lock()

    def stream(self) -> list[Callable[[], Any]]:
        return []

    def host(self, size: int) -> torch.Tensor:
        return torch.full((size,), 0xA5, dtype=torch.uint8)

    def mark(self) -> str:
        return "posted"

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any, after: Any) -> Any:
        assert after == "posted"
        stream.append(lambda: target.copy_(source))
        return stream, len(stream)

    def reached(self, point: Any) -> None:
        stream, count = point
        with self._lock:
            for index in range(count):
                stream[index]()
                stream[index] = lambda: None

    join = reached


def _case(**values: Any) -> Case:
    base = {"mask": "documents_causal", "group": 4, "batch": 2, "kernel": "matmul"}
    return base | values


def _exact(case: Case, result: Results) -> None:
    want = reference_of(case)
    try:
        assert_exact({name: rel_error(getattr(want, name), got) for name, got in result.items()})
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("world", [2, 4])
def test_a_covering_part_of_the_product_is_exact(world: int) -> None:
    cases = [case for case in pairwise(AXES) if case["world"] == world][:: world // 2]
    staged = run_ranks(world, run_cases, cases, partial(plan_of, staged="cpu"))
    for case, *results in zip(cases, *staged, strict=True):
        for result in results:
            _exact(case, result)


def _late(
    rank: int, world: int, group: dist.ProcessGroup, case: Case
) -> tuple[list[tuple[int, bool]], bool, Results]:
    """The classes that the plan uses; whether plain gloo gave the same bits; the results."""
    del rank, world

    def make(case: Case, group: dist.ProcessGroup) -> ra.Plan:
        plan = plan_of(case, group)
        fabric = StagedFabric(group, torch.device("cpu"), copies=_LateCopies())
        plan.context._fabrics["cpu"] = fabric
        return plan

    late, plain = run_case(group, case, make=make), run_case(group, case)
    plan = plan_of(case, group)
    program = plan.program("forward", plan.context.rank, "matmul", torch.device("cpu"))
    same = all(torch.equal(late[name], tensor) for name, tensor in plain.items())
    return list(program.classes), same, late


@pytest.mark.parametrize("values", NODES, ids=lambda v: f"{v['method']}-{v['layout']}-{v['node']}")
def test_copies_that_come_late_are_waited_for(values: dict[str, Any]) -> None:
    case = _case(**values)
    for classes, same, result in run_ranks(case["world"], _late, case):
        assert same, "other bits than over plain gloo"
        _exact(case, result)
        if case["method"] == "double_ring" and case["node"] == 2:
            assert any(long for _, long in classes)


def _tardy_peer(rank: int, world: int, group: dist.ProcessGroup) -> tuple[list[int], str]:
    """Both classes of both lanes at once; then a message that nobody sends."""
    del world
    fabric = StagedFabric(group, torch.device("cpu"), copies=_LateCopies())
    classes = [(lane, long) for lane in (0, 1) for long in (False, True)]
    fabric.open(classes)
    handles, inboxes, peer = [], [], 1 - rank
    for tag, (lane, long) in enumerate(classes * 2):
        sent = torch.full((1000,), 10 * tag + rank, dtype=torch.uint8)
        inboxes.append(torch.zeros(1000, dtype=torch.uint8))
        handles.append(
            fabric.exchange([(peer, sent)], [(peer, inboxes[-1])], lane=lane, long=long, tag=tag)
        )
    for handle in reversed(handles):  # in no order that the fabric could count on
        handle.wait()
    values = [int(inbox.unique().item()) for inbox in inboxes]
    assert fabric.received_bytes == 1000 * len(inboxes)
    if rank:
        return values, ""
    fabric.timeout = timedelta(milliseconds=300)
    lost = torch.zeros(8, dtype=torch.uint8)
    handle = fabric.exchange([], [(peer, lost)], lane=1, long=True, tag=99)
    with pytest.raises(RuntimeError) as raised:
        handle.wait()
    with pytest.raises(RuntimeError, match="an earlier exchange failed"):
        fabric.exchange([], [(peer, lost)], lane=0, long=False, tag=100)
    assert not lost.any()
    return values, str(raised.value)


def test_classes_do_not_wait_for_each_other_and_a_timeout_is_raised() -> None:
    pool = RankPool(2)
    try:
        (mine, error), (other, _) = pool.run(_tardy_peer, (), {}, timeout=300)
    finally:
        pool.kill()
    assert mine == [10 * tag + 1 for tag in range(8)]
    assert other == [10 * tag for tag in range(8)]
    assert "300" in error


def _refusals(rank: int, world: int, group: dist.ProcessGroup) -> list[str]:
    del rank, world
    assert backend_of(group, "cpu") == "gloo"
    messages = []
    for given, over in (("gpu", group), ("cuda", None), ("cuda", group)):
        try:
            check_staging(given, over)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_staged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (messages,) = run_ranks(1, _refusals)
    assert "must be 'cuda', 'cpu' or None" in messages[0]
    assert "needs a process group" in messages[1]
    if not torch.cuda.is_available():
        assert "there is no CUDA device" in messages[2]
    with pytest.raises(UserError, match="needs a process group"):
        ra.ContextParallel(4, heads=(4, 1), head_dim=8, staged="cpu")
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(UserError, match="goes over gloo, the group has cuda:nccl"):
        check_staging("cpu", object())  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("values", NODES, ids=lambda v: f"{v['method']}-{v['layout']}-{v['node']}")
def test_ranks_share_a_gpu(values: dict[str, Any]) -> None:
    """Streams, events and pinned memory: the same case on the device that all ranks use."""
    case = _case(**values)
    for (result,) in run_ranks(case["world"], run_cases, [case], partial(plan_of, staged="cuda")):
        _exact(case, result)
