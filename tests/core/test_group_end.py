"""What is left of a process group once it has been destroyed."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from tests.ranks import run_ranks


def _use_and_destroy(rank: int, world: int, group: dist.ProcessGroup) -> tuple[bool, str]:
    del rank, group
    mine = dist.new_group(list(range(world)))
    assert isinstance(mine, dist.ProcessGroup)
    cp = ra.ContextParallel(mine, heads=(2, 1), head_dim=8)
    plan = cp.plan(ra.masks.causal(32))
    q, k, v = (torch.randn(1, plan.layout.sizes[cp.rank], h, 8) for h in (2, 1, 1))
    ra.attention(q, k, v, plan)
    left = weakref.ref(mine)
    gc.collect()
    gc.disable()
    try:
        dist.destroy_process_group(mine)
        del mine
        freed = left() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError) as error:
        ra.attention(q, k, v, plan)
    return freed, str(error.value)


def test_plans_do_not_keep_a_group_alive() -> None:
    """Its threads would run on into the interpreter's end, and could abort it there."""
    for freed, message in run_ranks(2, _use_and_destroy):
        assert freed
        assert "has been destroyed" in message
