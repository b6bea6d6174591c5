"""The rows of a tensor that a rank keeps under `Shard(0)` on a mesh of one axis."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def rows_of(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's rows of `whole`, a view: equal runs of ceil(rows / ranks), the last ones short.

    Those of `torch.chunk`, which DTensor and FSDP2 follow; late ranks may have none.
    """
    run = -(-whole.shape[0] // mesh.size())
    start = min(run * mesh.get_local_rank(), whole.shape[0])
    return whole[start : start + run]


def as_sharded(rows: torch.Tensor, shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    """This rank's rows as a part of a tensor of `shape`. No copy, no communication."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def empty_rows(shape: torch.Size, mesh: DeviceMesh) -> DTensor:
    """An uninitialised float32 tensor of `shape`, of which each rank holds its rows."""
    own = rows_of(torch.empty(shape, device="meta"), mesh)
    return as_sharded(torch.empty(own.shape, device=mesh.device_type), shape, mesh)
