"""Ranks that disagree, come late, or leave: an error on every rank in time, never a hang.

Tests that break a group use processes of their own, not the pools that other tests share.
"""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn import CommunicationError, PlanError
from tests.closeness import assert_close
from tests.core.cases import inputs
from tests.core.exactness import TOLERANCE
from tests.ranks import RankPool, run_ranks

TIMEOUT = timedelta(seconds=1)
S = 64


@pytest.fixture
def pair() -> Iterator[RankPool]:
    """Two ranks whose group may be broken."""
    pool = RankPool(2)
    yield pool
    pool.kill()


def _context(group: dist.ProcessGroup, **options: Any) -> ra.ContextParallel:
    settings: dict[str, Any] = {
        "heads": (4, 1),
        "head_dim": 8,
        "dtype": torch.float64,
        "layout": "contiguous",
        "method": "ring",
        "kernel": "matmul",
    }
    return ra.ContextParallel(group, **(settings | options))


def _other_plans(rank: int, world: int, group: dist.ProcessGroup, odd: int, what: str) -> str:
    """One rank holds another plan; afterwards the group still works."""
    del world
    mask, x = ra.masks.causal(S), inputs(S, 4, 1)
    options: dict[str, Any] = {}
    if rank == odd:
        mask = ra.masks.sliding_window(S, 40, 0) if what == "mask" else mask
        options = {"method": {"method": "direct"}, "layout": {"layout": "zigzag"}}.get(what, {})
    plan = _context(group, **options).plan(mask)
    kind, message = _error_of(
        lambda: ra.attention(plan.shard(x.q), plan.shard(x.k), plan.shard(x.v), plan)
    )
    assert kind == PlanError.__name__, message
    healthy = _context(group).plan(ra.masks.causal(S))
    out = ra.attention(healthy.shard(x.q), healthy.shard(x.k), healthy.shard(x.v), healthy)
    want = ra.reference(x.q, x.k, x.v, healthy.mask)
    assert_close("out after the error", want.out, healthy.unshard(out), TOLERANCE)
    return message


@pytest.mark.parametrize("what", ["mask", "method", "layout"])
@pytest.mark.parametrize("odd", [0, 2])
def test_other_plans_on_one_rank_are_an_error_on_all(odd: int, what: str) -> None:
    strangers = [1, 2] if odd == 0 else [2]
    for rank, message in enumerate(run_ranks(3, _other_plans, odd, what)):
        assert message.startswith(f"rank {rank}: ranks {strangers} hold another plan than rank 0")
        assert "give every rank the same mask" in message


def _absent(
    rank: int, world: int, group: dist.ProcessGroup, moment: str, staged: str | None
) -> tuple[str, str] | None:
    """Rank 1 stays away at some moment. Returns the error's type and text on rank 0."""
    del world
    first_use = moment == "first use"
    context = _context(group, timeout=TIMEOUT if first_use else None, staged=staged)
    plan = context.plan(ra.masks.full(S))
    x = inputs(S, 4, 1)
    q, k, v = (plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    if first_use:
        return None if rank else _error_of(lambda: ra.attention(q, k, v, plan))
    out = ra.attention(q, k, v, plan)
    plan.unshard(out.detach())  # both ranks have come this far
    if rank == 1:
        if moment == "gone":
            dist.destroy_process_group()
        return None
    # The timeout is set here, so that a slow start cannot be taken for the failure.
    plan.context.fabric(q.device).timeout = TIMEOUT  # type: ignore[attr-defined]
    if moment == "backward":
        return _error_of(lambda: out.backward(plan.shard(x.dout)))
    first = _error_of(lambda: ra.attention(q, k, v, plan))
    if staged and moment == "forward":  # a late message must not meet another run's memory
        _, again = _error_of(lambda: ra.attention(q, k, v, plan))
        assert "an earlier exchange failed: " in again
    return first


def _error_of(action: Callable[[], object]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", "no error"


@pytest.mark.parametrize("staged", [None, "cpu"])
@pytest.mark.parametrize("moment", ["forward", "backward", "gone"])
def test_a_rank_that_does_not_come_is_named_in_time(
    pair: RankPool, moment: str, staged: str | None
) -> None:
    answer, _ = pair.run(_absent, (moment, staged), {}, timeout=300)
    kind, message = answer
    assert kind == CommunicationError.__name__, message
    direction = "backward" if moment == "backward" else "forward"
    assert message.startswith(f"rank 0: {direction} plan step 0: move 0 (K rows 0:32 from rank 1)")


@pytest.mark.parametrize("staged", [None, "cpu"])
def test_a_rank_that_never_comes_to_the_first_use_is_told_in_time(
    pair: RankPool, staged: str | None
) -> None:
    answer, _ = pair.run(_absent, ("first use", staged), {}, timeout=300)
    kind, message = answer
    assert kind == CommunicationError.__name__, message
    assert message.startswith("rank 0: comparing plans before step 0 did not complete: ")
