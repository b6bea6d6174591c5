"""Seconds of a published training step or prefill, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ringattn.benchmarks.simulator.attention import Attention, Prices, attention_of, exact_area
from ringattn.benchmarks.simulator.figures import generation
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.tables import base_name, clock, entry_for
from ringattn.cost import Cluster
from ringattn.cost.step_shapes import ModelShape
from ringattn.cost.step_time import ring_gbs
from ringattn.errors import UserError

NARROW, WIDE = 2, 4
ADAM_BYTES = 28
"""Traffic of an optimizer per parameter, as in `ringattn.cost.step_time`."""
LOGIT_PASSES = 6
"""Passes over float32 logits of a head and loss that are not fused, both directions."""


@dataclass(frozen=True)
class StepParts:
    """A predicted step of one rank.

    Attributes:
        seconds: by part; they do not overlap and sum to the step.
        tokens: of the step, a rank's share. flops: of a rank, as the row's metric counts them.
        peak_tflops: of the rank.
    """

    seconds: Mapping[str, float]
    tokens: float
    flops: float
    peak_tflops: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


def shape_of(row: Published) -> ModelShape:
    """The model of a row that has one."""
    if row.shape is None:
        raise UserError(f"model {row.model!r}", "is attention alone", "give a model's row")
    return row.shape


def source_of(row: Published) -> Mapping[str, float | str]:
    """What is known about the system behind a row."""
    return entry_for("sources", f"{row.source} | {row.method}")


def checkpointing_of(row: Published) -> Mapping[str, float | str]:
    """What a row checkpoints: as stated, else as its source does."""
    return entry_for("checkpointing", row.checkpointing or str(source_of(row)["checkpointing"]))


def is_forward_only(row: Published) -> bool:
    """Whether the row timed inference."""
    return "prefill" in row.metric or row.says("prefill|inference")


def batch_of(row: Published) -> float:
    """Sequences of one micro-batch of a rank group, as notes state them; else one."""
    return max(1.0, row.split.get("batch", 1.0))


def accumulated(row: Published) -> float:
    """Micro-batches of a step: as stated, else as its source usually has."""
    return max(1.0, row.split.get("accumulate", float(source_of(row).get("accumulate", 1.0))))


def stage_of(row: Published) -> int:
    """ZeRO stage: as stated, else the method's, else 3."""
    entry = entry_for("methods", row.method)
    return int(min(row.split.get("zero", entry.get("sharded", 3)), entry.get("most", 3)))


def step_parts(row: Published, prices: Prices) -> StepParts:
    """Predicts the step of a row.

    Raises:
        UserError: the row names no length, or its attention cannot be planned.
    """
    shape = shape_of(row)
    if row.seq_len < 1:
        raise UserError("seq_len", "is missing", "state the length")
    call = attention_of(row)
    if source_of(row).get("pairs") == "all":
        call = replace(call, mask="full")
    whole = prices.cluster(row, row.per_node or 8)
    figures, forward_only = prices.figures, is_forward_only(row)
    check = checkpointing_of(row)
    again = 0.0 if forward_only else float(check["again"])
    repeated = 0.0 if forward_only else float(check["attention_again"])
    passes = 1.0 if forward_only else 3.0
    layers, runs = shape.layers / row.pp, accumulated(row)
    tokens = batch_of(row) * row.seq_len / row.cp
    # Products: of the layers, and of the head.
    share = figures.step(f"gemm_share@{generation(base_name(row.hardware))}")
    gemm = 1e12 * whole.peak_tflops * clock(row.hardware) * share
    gemm *= tokens / (tokens + figures.step("gemm_half_tokens"))
    fp8 = figures.step("fp8_gain") if "fp8" in row.dtype.lower() else 1.0
    product = 2.0 * shape.layer_products * tokens / (row.tp * gemm * fp8)
    head = 2.0 * passes * shape.head_parameters * tokens / (row.tp * row.pp * gemm)
    memory = 1e9 * whole.memory_gbs * figures.step("elementwise_share")
    if not is_fused_loss(row):
        kept = 1.0 if forward_only else LOGIT_PASSES
        head += kept * WIDE * tokens * shape.vocab_size / (row.tp * row.pp * memory)
    # Attention.
    forward, backward = attention_seconds(row, prices, call)
    once = batch_of(row) / figures.step("attention_share")
    forward, backward = forward * once, backward * once
    # Everything else of a layer.
    numbers = 11 * shape.dim + 3 * (shape.q_width + shape.kv_width) + 5 * shape.ffn_dim
    traffic = NARROW * tokens * numbers / row.tp
    if row.says("compile"):
        traffic /= figures.step("compiled_gain")
    plain = traffic / memory
    tensor = tensor_seconds(row, shape, whole, figures.step("tensor_share"))
    computed = passes + again
    layer_us = 1e-6 * figures.step("layer_us") * computed / 3
    seconds = {
        "products": layers * runs * passes * product,
        "products again": layers * runs * again * product,
        "attention": layers * runs * (forward + (0.0 if forward_only else backward)),
        "attention again": layers * runs * repeated * forward,
        "head and loss": runs * head,
        "elementwise": layers * runs * computed * plain,
        "tensor parallel": layers * runs * computed * tensor,
        "launches": layers * runs * layer_us,
    }
    bubble = (row.pp - 1) / max(batch_of(row), 1.0) if row.pp > 1 else 0.0
    seconds["bubble"] = bubble * sum(seconds.values())
    computing = sum(seconds.values())
    exchange = exchange_seconds(row, shape, whole, figures.step("exchange_share"), runs)
    exchange += host_bytes(row, shape, tokens) / (1e9 * figures.step("host_gbs"))
    # What is longer, and the part of what is shorter that nothing hides.
    shown = figures.step("exposed") * min(computing, exchange)
    seconds["exchange"] = max(computing, exchange) + shown - computing
    if not forward_only:
        ranks = row.gpus if stage_of(row) else 1
        mine = shape.parameters / (row.tp * row.pp) / max(1, ranks // (row.tp * row.pp))
        host = row.split.get("opt_offload", 0.0) > 0
        node = min(row.gpus, row.per_node or 8)
        rate = 1e9 * (figures.step("adam_gbs") / node if host else whole.memory_gbs)
        seconds["update"] = ADAM_BYTES * mine / rate
        seconds["step"] = 1e-3 * figures.step("step_ms")
    return StepParts(
        seconds=seconds,
        tokens=tokens * runs / (row.tp * row.pp),
        flops=counted_flops(row, shape, call, tokens * runs),
        peak_tflops=whole.peak_tflops,
    )


def attention_seconds(row: Published, prices: Prices, call: Attention) -> tuple[float, float]:
    """Forward and backward of one layer's attention for one sequence."""
    forward = prices.seconds(row, call, ("forward",))[0]
    backward = 0.0 if is_forward_only(row) else prices.seconds(row, call, ("backward",))[0]
    passes = float(entry_for("methods", row.method).get("passes", 0.0))
    if passes:  # over the scores of every block, which are stored
        scores = NARROW * call.heads[0] * call.seq_len**2 / call.world
        forward += passes * scores / (1e9 * prices.cluster(row, 8).memory_gbs)
    return forward, backward


def is_fused_loss(row: Published) -> bool:
    """Whether logits are never stored whole: stated, or BurstEngine's and ALST's own habit."""
    if row.split.get("fused_loss") == 0.0:
        return False
    if row.says("fused lm head|fused.?loss|liger=1") or "fusedloss" in row.method:
        return not row.method.startswith("burst-ablation") or "fusedloss" in row.method
    return row.method.startswith(("upipe", "alst"))


def tensor_seconds(row: Published, shape: ModelShape, cluster: Cluster, share: float) -> float:
    """Collectives of one pass through a layer: two gathers and two scatters of the tokens."""
    if row.tp == 1:
        return 0.0
    rate = 1e9 * share * ring_gbs(cluster, row.tp)
    nbytes = NARROW * batch_of(row) * row.seq_len / row.cp * shape.dim
    return 4 * nbytes * (row.tp - 1) / row.tp / rate


def exchange_seconds(
    row: Published, shape: ModelShape, cluster: Cluster, share: float, runs: float
) -> float:
    """Collectives of weights and gradients, as rings over all ranks that hold the same weights."""
    ranks = row.gpus // max(1, row.tp * row.pp)
    stage = stage_of(row)
    if ranks <= 1 or stage == 0:
        return 0.0
    rate = 1e9 * share * ring_gbs(cluster, row.gpus)
    weights = shape.parameters / (row.tp * row.pp)
    if is_forward_only(row):
        return NARROW * weights / rate if stage == 3 else 0.0
    gathers = 2 * runs if stage == 3 else 1
    return NARROW * weights * (gathers + (runs if stage >= 2 else 1)) * (ranks - 1) / ranks / rate


def host_bytes(row: Published, shape: ModelShape, tokens: float) -> float:
    """Bytes that a rank copies to the host and back: activations, weights, gradients."""
    check = checkpointing_of(row)
    kept = row.split.get("act_offload", float(check["offload"]))
    moved = 2 * kept * NARROW * tokens * shape.dim * shape.layers / row.pp
    weights = shape.parameters / row.gpus
    if row.split.get("opt_offload", 0.0) and not is_forward_only(row):
        moved += (WIDE + NARROW) * weights
    return moved + row.split.get("param_offload", 0.0) * (WIDE + NARROW) * weights


def counted_flops(row: Published, shape: ModelShape, call: Attention, tokens: float) -> float:
    """Operations of a rank's step as the row's source counts them.

    Megatron and NeMo count attention as a full square; others count the mask's pairs.
    """
    square = row.says("full.square|megatron flops") or "nemo" in row.source.lower()
    pairs = float(row.seq_len) ** 2 if square else exact_area(call)
    products = shape.layers * shape.layer_products + shape.head_parameters
    attention = 12.0 * shape.q_width * shape.layers * pairs / row.seq_len
    return (6.0 * products + attention) * tokens / (row.tp * row.pp)
