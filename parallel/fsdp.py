"""PyTorch's `fully_shard` (FSDP2) for a stack of layers, with summed gradients.

Each layer is one group of parameters that is gathered and reduced together, and what lies outside
the layers is another. A rank keeps the rows of every parameter that `Shard(0)` gives it.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from ringattn.parallel.grads import exact_norm


def shard_layers(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    bf16: bool,
    reshard: bool,
    offload: bool,
) -> None:
    """Makes the model's parameters float32 `DTensor`s over `mesh`, in place.

    Gradients are summed over the mesh, in float32, at every backward pass: they add up in shards.

    Args:
        model: on the meta device, or alike on every rank.
        layers: parts of it that are gathered one at a time.
        mesh: one axis, all ranks.
        bf16: gather and compute in bfloat16.
        reshard: layers give up gathered parameters after the forward.
        offload: shards, gradients and optimizer live in host memory; on a CPU they do anyway.
    """
    # Inputs of a layer are left as they are: rotary tables stay in float32.
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )
    host = offload and mesh.device_type != "cpu"
    policy = CPUOffloadPolicy() if host else OffloadPolicy()
    for layer in layers:
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=mixed,
            offload_policy=policy,
        )
    # The root's parameters are needed at both ends of the forward and at once in the backward.
    fully_shard(
        model, mesh=mesh, reshard_after_forward=False, mp_policy=mixed, offload_policy=policy
    )
    for module in sharded_modules(model):
        # The loss is divided by the step's global token count, so gradients add up. A plain sum
        # is also all that gloo can do.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Gives up every gathered parameter, which a forward without a backward leaves behind."""
    for module in sharded_modules(model):
        module.reshard()


def clip_shards(
    parameters: Iterable[torch.Tensor], group: dist.ProcessGroup, max_norm: float
) -> torch.Tensor:
    """Scales sharded gradients by min(1, max_norm / norm); max_norm 0 leaves them.

    Every rank of the group calls it.

    Returns:
        The L2 norm of the whole gradient before scaling, a float32 scalar tensor.
    """
    grads = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    squares = torch.stack([exact_norm(grad) for grad in grads]).square().sum()
    dist.all_reduce(squares, group=group)
    norm = squares.sqrt().float()
    if max_norm > 0:
        # No host synchronisation: the factor stays on the device.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor)
    return norm


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The parts of a model whose parameters are gathered together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
