"""The pool of ranks: results come in order, and what goes wrong is told about every rank."""

import os
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _sum(rank: int, world: int, group: dist.ProcessGroup, x: torch.Tensor, *, scale: int) -> Any:
    total = x * (rank + 1)
    dist.all_reduce(total, group=group)
    return rank, world, total * scale, torch.get_num_threads()


def _process_id(rank: int, world: int, group: dist.ProcessGroup) -> int:
    return os.getpid()


def _raise_on_odd(rank: int, world: int, group: dist.ProcessGroup) -> None:
    if rank % 2:
        raise ValueError(f"odd one out: {rank}")


def _raise_before_barrier(rank: int, world: int, group: dist.ProcessGroup) -> None:
    if rank == 1:
        raise ValueError("never joins the barrier")
    dist.barrier(group=group)


def _unmatched_barrier(rank: int, world: int, group: dist.ProcessGroup) -> int:
    if rank == 0:
        dist.barrier(group=group)
    return rank


def _die(rank: int, world: int, group: dist.ProcessGroup) -> int:
    if rank == 1:
        os._exit(7)
    return rank


def _unpicklable(rank: int, world: int, group: dist.ProcessGroup) -> Any:
    return threading.Lock()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_results_by_rank(world: int) -> None:
    results = run_ranks(world, _sum, torch.ones(3), scale=2)
    expected = torch.full((3,), 2.0 * sum(range(1, world + 1)))
    for rank, (got_rank, got_world, total, threads) in enumerate(results):
        assert (got_rank, got_world, threads) == (rank, world, 1)
        assert torch.equal(total, expected)


def test_processes_are_reused() -> None:
    assert run_ranks(2, _process_id) == run_ranks(2, _process_id)


def test_raising_ranks_are_all_told_in_one_error_and_the_pool_is_renewed() -> None:
    before = run_ranks(2, _process_id)
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, _raise_on_odd)
    message = str(caught.value)
    assert "_raise_on_odd failed on 1 of 2 ranks" in message
    assert "--- rank 1: raised" in message
    assert "ValueError: odd one out: 1" in message
    assert "--- rank 0" not in message
    assert not set(before) & set(run_ranks(2, _process_id))


def test_ranks_left_waiting_by_a_failed_one_are_told_too() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, _raise_before_barrier)
    message = str(caught.value)
    assert "failed on 2 of 2 ranks" in message
    assert "never joins the barrier" in message
    assert "--- rank 0: no answer after another rank failed" in message


def test_a_hanging_rank_is_named_with_its_stack() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, _unmatched_barrier, timeout=2.0)
    message = str(caught.value)
    assert "--- rank 0: no answer within 2 s" in message
    assert "in _unmatched_barrier" in message
    assert "--- rank 1" not in message


def test_a_dying_rank_is_named_with_its_exit_code() -> None:
    with pytest.raises(AssertionError, match="--- rank 1: process died, exit code 7"):
        run_ranks(2, _die)


def test_a_result_that_cannot_travel_is_an_error_of_its_rank() -> None:
    with pytest.raises(AssertionError, match="cannot pickle '_thread.lock'"):
        run_ranks(1, _unpicklable)
    assert run_ranks(1, _sum, torch.ones(1), scale=1)[0][0] == 0
