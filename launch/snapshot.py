"""The part of a checkpoint that a rank writes: its rows, as views or as a copy in host memory."""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ringattn.parallel.host_memory import Copies, HostBuffers
from ringattn.parallel.rows import as_sharded, rows_of

_ALIGNMENT = 64


def own_rows(
    tensors: dict[str, torch.Tensor], mesh_of: Callable[[torch.device], DeviceMesh]
) -> dict[str, torch.Tensor]:
    """The same global tensors, of which this rank holds its rows alone. No copy, no communication.

    Args:
        tensors: plain ones are equal on every rank; sharded ones (`DTensor`) stay as they are, and
            so do scalars.
        mesh_of: the mesh of one axis over all ranks for tensors on a device.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() and not isinstance(tensor, DTensor):
            mesh = mesh_of(tensor.device)
            found[name] = as_sharded(rows_of(tensor, mesh), tensor.shape, mesh)
    return found


def own_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of what this rank holds of them."""
    return sum(t.numel() * t.element_size() for t in map(_local, tensors.values()))


class Snapshot:
    """Copies in host memory that is used again for the next snapshot.

    Args:
        copies: of the rank's device; makes the memory.
        mesh: on the CPU, of one axis over all ranks; None for a single process.
    """

    def __init__(self, copies: Copies, mesh: DeviceMesh | None) -> None:
        self._buffers, self._mesh = HostBuffers(copies), mesh

    def take(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies what this rank holds, done on return. The last snapshot's values are gone.

        Args:
            tensors: as `own_rows` returns them, on any device.
        """
        starts: dict[str, int] = {}
        end = 0
        for name, tensor in tensors.items():
            starts[name] = end
            end += -(-own_bytes({name: tensor}) // _ALIGNMENT) * _ALIGNMENT
        buffer = self._buffers.take(max(end, 1))
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                local = _local(tensor)
                stop = starts[name] + local.numel() * local.element_size()
                copy = buffer.memory[starts[name] : stop].view(local.dtype).view(local.shape)
                copy.copy_(local, non_blocking=True)
                found[name] = self._placed(copy, tensor)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        self._buffers.give(buffer)
        return found

    def _placed(self, copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return copy
        assert self._mesh is not None, "only a mesh shards tensors"
        return as_sharded(copy, tensor.shape, self._mesh)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
