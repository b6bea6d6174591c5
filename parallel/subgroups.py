"""Groups of consecutive ranks of the default group."""

from datetime import timedelta

import torch.distributed as dist


def run_of_ranks(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks that this rank lies in. Every rank calls it together.

    Args:
        size: ranks of each group, a divisor of the world size.
        timeout: how long a collective of the group waits for a missing rank.

    Raises:
        ValueError: the groups do not cover all ranks.
    """
    world = dist.get_world_size()
    if world % size:
        raise ValueError(f"groups of {size} ranks do not cover {world}")
    runs = [list(range(first, first + size)) for first in range(0, world, size)]
    group, _ = dist.new_subgroups_by_enumeration(runs, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup), "every rank lies in one run"
    return group
