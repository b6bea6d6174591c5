"""What may stand for a group of ranks: a mesh, a process group, or a number of simulated ranks."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.errors import UserError


def resolve_group(
    group: "DeviceMesh | dist.ProcessGroup | int | None",
) -> tuple[dist.ProcessGroup | None, int, int]:
    """(process group, world, rank) of whatever stands for the group. No communication.

    Raises:
        UserError: it is no group of this rank, or torch.distributed is not initialised.
    """
    if isinstance(group, bool) or (isinstance(group, int) and group < 1):
        raise UserError(f"group={group!r}", "must be >= 1 simulated ranks", "pass e.g. 8")
    if isinstance(group, int):
        return None, group, 0
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise UserError(
                f"mesh with axes {group.mesh_dim_names}",
                "context parallelism needs a mesh of one axis",
                'pass a slice, e.g. mesh["cp"]',
            )
        group = group.get_group()
    if not dist.is_initialized():
        raise UserError(
            "group=None",
            "torch.distributed is not initialised",
            "call init_process_group first, or pass a number of simulated ranks",
        )
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise UserError(
            f"group={group!r}", "must be a DeviceMesh or a ProcessGroup of this rank", "pass one"
        )
    return group, dist.get_world_size(group), dist.get_rank(group)
