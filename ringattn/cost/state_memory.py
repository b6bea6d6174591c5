"""Weights, gradients and optimizer states of one rank, by engine."""

from dataclasses import dataclass

from ringattn.cost.step_shapes import ModelShape, StepSettings

WIDE, NARROW = 4, 2
MOMENTS = 2
"""AdamW keeps as many numbers per weight."""
ZERO_BUCKET = 50_000_000
"""Numbers of DeepSpeed's buffer for gradients, see `ringattn.parallel.zero`."""


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that stay for the whole run, and those that come and go.

    Attributes:
        parameters, gradients, optimizer: on the device between steps.
        host: in host memory.
        outer: gathered weights outside of the layers, from the first layer to the last backward.
        head: those of the output head, while it is at work.
        layer: a layer's gathered weights, while it is at work. behind: buffer of a gather that is
            there beside them, and until the next one.
        stays: a layer's gathered weights wait for the backward.
        layer_kept: cast weights that a layer keeps from its forward to its backward.
        layer_reduced, outer_reduced: buffer of a reduction, until the next one.
        layer_shards, outer_shards: what a reduction leaves, until the optimizer step.
        bucket: buffer for gradients, from the first backward operation to the last.
        flush: copies that the last bucket's reduction makes. update: scratch of the optimizer step.
    """

    parameters: float
    gradients: float
    optimizer: float
    host: float = 0.0
    outer: float = 0.0
    head: float = 0.0
    layer: float = 0.0
    behind: float = 0.0
    stays: bool = False
    layer_kept: float = 0.0
    layer_reduced: float = 0.0
    outer_reduced: float = 0.0
    layer_shards: float = 0.0
    outer_shards: float = 0.0
    bucket: float = 0.0
    flush: float = 0.0
    update: float = 0.0


def states_of(shape: ModelShape, settings: StepSettings) -> States:
    """The states of an engine with these settings."""
    makers = {"ddp": _replicated, "fsdp": _fully_sharded, "deepspeed": _zero}
    return makers[settings.engine](shape, settings)


def _replicated(shape: ModelShape, settings: StepSettings) -> States:
    """Everything in float32 on every rank; autocast caches narrow weights of the forward."""
    whole = WIDE * shape.parameters
    tiled = settings.token_tile is not None
    return States(
        parameters=whole,
        gradients=whole,
        optimizer=MOMENTS * whole,
        layer_kept=NARROW * shape.layer_products if settings.autocast and not tiled else 0.0,
    )


def _fully_sharded(shape: ModelShape, settings: StepSettings) -> States:
    """`fully_shard`: float32 shards; one layer at a time is gathered in the compute dtype.

    A gather lands in a flat buffer that is copied into weights; the forward keeps it until the next
    gather, the backward has the next layer's there ahead. A layer's gradients are copied into a
    float32 buffer, which is summed and scattered, and stays until the next layer's.
    """
    ranks, item = settings.ranks, settings.compute_bytes
    shard = WIDE * shape.parameters / ranks
    offload = settings.offload == "parameters" and settings.device != "cpu"
    layer, outer = shape.layer_parameters, shape.outer_parameters
    several = settings.micro_batches > 1
    return States(
        parameters=0.0 if offload else shard,
        gradients=shard if several and not offload else 0.0,
        optimizer=0.0 if offload else MOMENTS * shard,
        host=(2 + MOMENTS) * shard if offload else 0.0,
        outer=item * outer,
        layer=item * layer,
        behind=item * layer if ranks > 1 else 0.0,
        stays=not settings.reshard,
        layer_reduced=WIDE * layer,
        outer_reduced=WIDE * outer,
        layer_shards=WIDE * layer / ranks if not several and not offload else 0.0,
        outer_shards=WIDE * outer / ranks if not several and not offload else 0.0,
    )


def _zero(shape: ModelShape, settings: StepSettings) -> States:
    """DeepSpeed ZeRO: narrow weights, float32 masters and moments sharded from stage 1 on."""
    item, ranks, on_cpu = settings.compute_bytes, settings.ranks, settings.device == "cpu"
    whole, stage = shape.parameters, settings.zero_stage
    master = WIDE * whole / ranks
    host_optimizer = settings.offload != "none"
    host_weights = settings.offload == "parameters" and stage == 3
    weights = item * whole / (ranks if stage == 3 else 1)
    grads = WIDE * whole / (ranks if stage >= 2 else 1)
    optimizer = (1 + MOMENTS) * master
    return States(
        parameters=0.0 if host_weights else weights,
        gradients=grads + (WIDE * ZERO_BUCKET if stage == 3 else 0.0),
        bucket=item * ZERO_BUCKET if stage == 2 or (stage == 1 and item == WIDE) else 0.0,
        optimizer=0.0 if host_optimizer else optimizer,
        host=(optimizer if host_optimizer else 0.0) + (weights if host_weights else 0.0),
        layer=item * shape.layer_parameters if stage == 3 else 0.0,
        head=item * shape.head_parameters if stage == 3 else 0.0,
        behind=item * shape.layer_parameters if stage == 3 else 0.0,
        layer_reduced=item * shape.layer_parameters,
        outer_reduced=item * shape.outer_parameters,
        flush=(WIDE + on_cpu * (WIDE if stage == 3 else item)) * min(whole, ZERO_BUCKET),
        update=0.0 if host_optimizer else master,
    )
