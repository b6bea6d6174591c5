"""The device mesh: dp replicas × cp ranks per sequence."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

DP_AXIS, CP_AXIS, WORLD_AXIS = "dp", "cp", "dp_cp"


@dataclass(frozen=True)
class TrainMesh:
    """This rank's place among dp × cp ranks.

    Attributes:
        device_mesh: axes ("dp", "cp"); cp ranks are neighbours, so that they share a node.
        dp, cp: sizes of the axes.
        dp_rank, cp_rank: this rank's coordinates.
        world: the group of all dp × cp ranks, over which gradients are summed.
    """

    device_mesh: DeviceMesh
    dp: int
    cp: int
    dp_rank: int
    cp_rank: int
    world: dist.ProcessGroup

    @property
    def cp_mesh(self) -> DeviceMesh:
        """The one-axis mesh of the ranks that share this rank's sequences."""
        return self.device_mesh[CP_AXIS]

    def world_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """The one-axis mesh of all dp × cp ranks. No communication.

        Args:
            device_type: of the tensors that are sharded over it; None takes the mesh's own.
        """
        kind = device_type or self.device_mesh.device_type
        return DeviceMesh.from_group(self.world, kind, mesh_dim_names=(WORLD_AXIS,))

    @property
    def rank(self) -> int:
        """Rank in the whole job: dp_rank * cp + cp_rank."""
        return self.dp_rank * self.cp + self.cp_rank


def build_mesh(device_type: str, *, dp: int, cp: int, timeout: timedelta) -> TrainMesh:
    """Makes the mesh over the default process group. Every rank calls it together.

    Groups are made one by one, because `init_device_mesh` would give them the back end's default
    timeout (half an hour on gloo) in place of the run's.

    Args:
        device_type: "cpu" or "cuda".
        dp, cp: sizes of the axes; their product is the size of the default group.
        timeout: how long a collective of any axis waits for a missing rank.

    Raises:
        ValueError: dp * cp is not the size of the default group.
    """
    world = dist.get_world_size()
    if dp * cp != world:
        raise ValueError(f"dp={dp} times cp={cp} must be the world size {world}")
    ranks = torch.arange(world).view(dp, cp)
    groups: list[dist.ProcessGroup] = []
    for lines in (ranks.T.tolist(), ranks.tolist()):
        group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timeout)
        assert isinstance(group, dist.ProcessGroup), "every rank lies on one line of each axis"
        groups.append(group)
    device_mesh = DeviceMesh.from_group(
        groups, device_type, mesh=ranks, mesh_dim_names=(DP_AXIS, CP_AXIS)
    )
    dp_rank, cp_rank = divmod(dist.get_rank(), cp)
    default_group = dist.group.WORLD
    assert default_group is not None
    return TrainMesh(
        device_mesh=device_mesh, dp=dp, cp=cp, dp_rank=dp_rank, cp_rank=cp_rank, world=default_group
    )
