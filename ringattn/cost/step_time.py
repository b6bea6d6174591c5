"""Predicts the seconds of a training step on a cluster, part by part.

Deliberately simple, and stated in full: attention by the priced plan, matrix products by their
operations at a fixed share of the peak, everything else by the bytes that it moves. Traffic of
sharded engines and of offloading runs beside the layers: what does not fit behind them is exposed.
"""

from dataclasses import dataclass, fields

from ringattn.cost.cluster import Cluster
from ringattn.cost.step_shapes import ModelShape, StepSettings

WIDE = 4
UPDATE_BYTES = 7 * WIDE
"""AdamW reads weight, gradient and two moments of a parameter and writes three of them."""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Parts of one optimizer step, in seconds; they do not overlap and sum to `total`.

    Attributes:
        attention_forward, attention_backward, attention_again: by the plan; again in checkpoints.
        products, products_again: matrix products of the layers; what is computed again.
        head: output head and loss. elementwise: norms, rotary embedding, activations, sums.
        exchange: parameters and gradients of the engine that no computation hides.
        offload: copies of kept activations that no computation hides.
        update: optimizer.
    """

    attention_forward: float
    attention_backward: float
    attention_again: float
    products: float
    products_again: float
    head: float
    elementwise: float
    exchange: float
    offload: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class AttentionSeconds:
    """One layer's attention on the slowest rank, by the plan.

    Attributes:
        forward, backward: seconds. again: share of the forward that "sequence" computes again.
    """

    forward: float
    backward: float
    again: float = 0.0


def step_seconds(
    shape: ModelShape,
    settings: StepSettings,
    cluster: Cluster,
    attention: AttentionSeconds,
    *,
    kept_bytes: float,
) -> StepSeconds:
    """Predicts a step.

    Args:
        shape: the model. settings: how it is run. cluster: where.
        attention: of one layer and micro-batch.
        kept_bytes: that offloading moves to the host and back, of all layers.
    """
    runs = settings.micro_batches
    layers = runs * shape.layers
    rate = 1e12 * cluster.peak_tflops * cluster.gemm_share
    tokens, mode = settings.tokens, settings.checkpointing
    product = 2.0 * shape.layer_products * tokens / rate
    again = 1.0 if mode != "none" or settings.token_tile is not None else 0.0
    if mode != "none" and settings.token_tile is not None:
        again += 1.0  # the tiles' own backward computes them again
        inputs = shape.dim * (shape.q_width + 2 * shape.kv_width) / shape.layer_products
        again -= 1.0 - inputs  # and the checkpoint stops before the second half
    repeated = {"none": 0.0, "attention": 0.0, "sequence": attention.again, "full": 1.0}[mode]
    plain = _elementwise_bytes(shape, settings) / (1e9 * cluster.memory_gbs)
    local = (3 + again) * product + (3 + again) * plain
    layer = local + (1 + repeated) * attention.forward + attention.backward
    return StepSeconds(
        attention_forward=layers * attention.forward,
        attention_backward=layers * attention.backward,
        attention_again=layers * repeated * attention.forward,
        products=layers * 3 * product,
        products_again=layers * again * product,
        head=runs * 6.0 * shape.head_parameters * tokens / rate,
        elementwise=layers * (3 + again) * plain,
        exchange=_exchange(shape, settings, cluster, layer),
        offload=max(0.0, 2 * runs * kept_bytes / (1e9 * cluster.host_gbs) - layers * layer),
        update=_update(shape, settings, cluster),
    )


def _elementwise_bytes(shape: ModelShape, settings: StepSettings) -> float:
    """Memory traffic of one layer's forward beside products and attention.

    Compiled, a chain of operations reads its operands and writes its results once.
    """
    r, e = settings.residual_bytes, settings.compute_bytes
    heads = shape.q_width + shape.kv_width
    if settings.compiled:
        numbers = 2 * 2 * r * shape.dim + 3 * r * shape.dim + 2 * e * heads
        return settings.tokens * (numbers + 3 * e * shape.ffn_dim)
    norms = 2 * (2 * r + 2 * WIDE) * shape.dim
    sums = 2 * 3 * r * shape.dim
    rotary = (2 * e + 10 * WIDE) * heads
    return settings.tokens * (norms + sums + rotary + 5 * e * shape.ffn_dim)


def _exchange(
    shape: ModelShape, settings: StepSettings, cluster: Cluster, layer_seconds: float
) -> float:
    """Exposed seconds of the engine's collectives, as rings over all ranks."""
    ranks = settings.ranks
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    rate = 1e9 * ring_gbs(cluster, ranks)
    weights = shape.parameters
    sharded = settings.engine == "fsdp" or settings.zero_stage == 3
    if settings.engine == "ddp" or not sharded:
        whole = 2 * WIDE if settings.engine == "ddp" else WIDE + settings.compute_bytes
        return whole * weights * share / rate  # after the last backward
    gathers = 1 if settings.engine == "fsdp" and not settings.reshard else 2
    each = gathers * settings.compute_bytes + WIDE
    moved = each * weights * share / rate
    return settings.micro_batches * max(0.0, moved - shape.layers * layer_seconds)


def ring_gbs(cluster: Cluster, ranks: int) -> float:
    """1e9 bytes per second that one rank receives in a collective of `ranks` ranks."""
    if ranks <= cluster.ranks_per_node:
        return cluster.intra.gbs
    # Rings run through every NIC of a node; each carries the ranks that share it.
    return min(cluster.intra.gbs, cluster.inter.gbs * cluster.nics_per_node)


def _update(shape: ModelShape, settings: StepSettings, cluster: Cluster) -> float:
    shard = shape.parameters / (1 if settings.engine == "ddp" else settings.ranks)
    if settings.offload == "none":
        return UPDATE_BYTES * shard / (1e9 * cluster.memory_gbs)
    moved = (WIDE + settings.compute_bytes) * shard / (1e9 * cluster.host_gbs)
    return UPDATE_BYTES * shard / (1e9 * cluster.host_memory_gbs) + moved


def model_flops(shape: ModelShape, tokens: float, area: float) -> float:
    """Operations of forward and backward as MFU counts them, of all ranks.

    Args:
        tokens: of the step. area: allowed pairs of the step's masks.
    """
    products = shape.layers * shape.layer_products + shape.head_parameters
    return 6.0 * products * tokens + 14.0 * area * shape.q_width * shape.layers
