"""Weights, gradients and optimizer states of one rank, by engine."""

from dataclasses import dataclass

from ringattn.cost.step_shapes import ModelShape, StepSettings

WIDE, NARROW = 4, 2
MOMENTS = 2
"""AdamW keeps as many numbers per weight."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that stay for the whole run, and those that come and go with a layer.

    Attributes:
        parameters, gradients, optimizer: on the device.
        host: in host memory.
        layer, outer: a layer's gathered or cast weights while it is at work, and those outside of
            the layers, for the whole step.
        layer_kept: cast weights that a layer keeps from its forward to its backward.
        layer_gradients, outer_gradients: beside `gradients`, while they are made and summed.
        ahead: layers whose weights are gathered while another is at work.
        update: scratch of the optimizer step.
    """

    parameters: float
    gradients: float
    optimizer: float
    host: float = 0.0
    layer: float = 0.0
    outer: float = 0.0
    layer_kept: float = 0.0
    layer_gradients: float = 0.0
    outer_gradients: float = 0.0
    ahead: int = 0
    update: float = 0.0


def states_of(shape: ModelShape, settings: StepSettings) -> States:
    """The states of an engine with these settings."""
    return {"ddp": _replicated, "fsdp": _fully_sharded, "deepspeed": _zero}[settings.engine](
        shape, settings
    )


def _replicated(shape: ModelShape, settings: StepSettings) -> States:
    """Everything in float32 on every rank; autocast caches narrow weights of the forward."""
    whole = WIDE * shape.parameters
    return States(
        parameters=whole,
        gradients=whole,
        optimizer=MOMENTS * whole,
        layer_kept=NARROW * shape.layer_products if settings.autocast else 0.0,
    )


def _fully_sharded(shape: ModelShape, settings: StepSettings) -> States:
    """`fully_shard`: float32 shards; layers are gathered in the compute dtype, the next one ahead.

    A layer's gradients are made whole in the compute dtype, copied into one float32 buffer and
    scattered as sums, while the next layer's are made.
    """
    shard, item = WIDE * shape.parameters / settings.ranks, settings.compute_bytes
    offload = settings.offload == "parameters" and settings.device != "cpu"
    layer, outer = shape.layer_parameters, shape.outer_parameters
    alone = settings.ranks == 1
    gathered = 0.0 if alone and item == WIDE else 1.0
    return States(
        parameters=0.0 if offload else shard,
        gradients=0.0 if offload else shard,
        optimizer=0.0 if offload else MOMENTS * shard,
        host=(2 + MOMENTS) * shard if offload else 0.0,
        layer=gathered * item * layer,
        outer=gathered * item * outer,
        layer_gradients=(item + WIDE) * layer,
        outer_gradients=(item + WIDE) * outer,
        ahead=1,
    )


def _zero(shape: ModelShape, settings: StepSettings) -> States:
    """DeepSpeed ZeRO: narrow weights, float32 masters and moments sharded from stage 1 on."""
    item, ranks = settings.compute_bytes, settings.ranks
    whole, stage = shape.parameters, settings.zero_stage
    master = WIDE * whole / ranks
    host_optimizer = settings.offload != "none"
    host_weights = settings.offload == "parameters" and stage == 3
    weights = item * whole / (ranks if stage == 3 else 1)
    grads = item * whole / (ranks if stage >= 2 else 1)
    optimizer = (1 + MOMENTS) * master
    return States(
        parameters=0.0 if host_weights else weights,
        gradients=grads,
        optimizer=0.0 if host_optimizer else optimizer,
        host=(optimizer if host_optimizer else 0.0) + (weights if host_weights else 0.0),
        layer=item * shape.layer_parameters if stage == 3 else 0.0,
        outer=item * shape.outer_parameters if stage == 3 else 0.0,
        layer_gradients=item * shape.layer_parameters,
        outer_gradients=item * shape.outer_parameters,
        ahead=1 if stage == 3 else 0,
        update=0.0 if host_optimizer else master,
    )
