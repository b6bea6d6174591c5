"""Peak memory of a published training step or inference on one GPU, part by part.

states      weights, gradients, master weights and moments, by ZeRO stage and offloading
outer       embedding and output head with their gradients, gathered whole, where weights are
            sharded
kept        what waits for the backward, by checkpointing mode; a key-value cache in inference
work        the layer at work: its activations times a fitted figure
logits      of the output head where they are stored whole, times a fitted figure of bytes each
context     of a driver-level reading: CUDA context and the allocator's unused blocks
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ringattn.benchmarks.simulator.figures import Figures
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.step_parts import (
    NARROW,
    WIDE,
    batch_of,
    checkpointing_of,
    is_forward_only,
    is_fused_loss,
    shape_of,
    source_of,
    stage_of,
)
from ringattn.benchmarks.simulator.tables import base_name, entry_for, memory_gib
from ringattn.cost import load_cluster
from ringattn.cost.step_shapes import ModelShape

GIB = 2**30
HOST_SHARE = 0.9
"""Of host memory that a run may fill."""
TILED_STREAMS = 12.5
"""Hidden states of all tokens that a layer holds beside the one whose MLP is computed in tiles."""
HOST_STATES = 30
"""Bytes of host memory per parameter whose optimizer is there, pinned copies included."""
PLAIN_STREAMS = 10
"""Hidden states of a layer that tensor parallelism without sequence parallelism does not share."""
COMPILED = 0.8
"""Share of a layer's kept activations that compiled code keeps."""
TILE = 8192
"""Tokens of a tile where the MLP is computed tile by tile."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one GPU at its peak, by part."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.parts.values())


def memory_parts(row: Published, figures: Figures, seq_len: int | None = None) -> MemoryParts:
    """Predicts the peak of a row, at another length where one is given."""
    if row.shape is None:
        return _attention_alone(row, seq_len or row.seq_len)
    shape = shape_of(row)
    tokens = batch_of(row) * (seq_len or row.seq_len) / (row.cp * row.tp)
    check = checkpointing_of(row)
    forward_only = is_forward_only(row)
    parts = _states(row, shape, forward_only)
    stream = NARROW * tokens * shape.dim
    layers = shape.layers / row.pp
    layer = layer_bytes(shape, tokens)
    source = source_of(row)
    if forward_only:
        kept = NARROW * 2 * tokens * shape.kv_width * layers * float(source.get("cache", 1.0))
    else:
        kept = stream * layers * (float(check["inputs"]) + float(check["outputs"]))
        compiled = COMPILED if row.says("compile") else 1.0
        kept += layers * float(check["layer"]) * layer * compiled
        offloaded = row.split.get("act_offload", float(check["offload"]))
        kept *= 1.0 if not offloaded else 2.0 / layers
    tiled = row.split.get("tiled_mlp", 0.0) > 0
    if entry_for("methods", row.method)["family"] == "megatron-tp-plain":
        # Without sequence parallelism every rank holds the residual stream of all tokens.
        whole = stream * (row.tp - 1)
        kept += 0.0 if forward_only else PLAIN_STREAMS * whole * layers * float(check["layer"])
        layer += 2 * whole
        parts["outer"] += NARROW * shape.head_parameters * (row.tp - 1) / row.tp
    work = (
        figures.step("work_layers")
        * float(source["work"])
        * (layer_bytes(shape, min(tokens, TILE)) if tiled else layer)
    )
    if tiled:
        work += TILED_STREAMS * stream
    elif row.cp > 1:
        work += float(source.get("ring", 0.0)) * stream
    each = figures.step("logits") * float(source["logits"])
    rows = min(tokens, TILE) if is_fused_loss(row) else tokens
    logits = each * rows * shape.vocab_size / row.pp
    # Scores of blocks of a ring, where attention is not fused.
    entry = entry_for("methods", row.method)
    block = NARROW * shape.heads * batch_of(row) * tokens**2 / max(batch_of(row), 1.0) ** 2
    scores = 0.0
    if entry.get("scores") == "all":
        scores = row.cp * block * (2 if forward_only else layers)
    elif entry.get("scores") == "one":
        scores = block * (3 if forward_only else 2)
    parts |= {"kept": kept, "work": max(work, 0.0), "logits": logits, "scores": scores}
    if forward_only:  # layers and head come one after the other, and nothing waits for a backward
        parts["work"] /= 3
        later = "logits" if logits < scores + parts["work"] else "work"
        parts[later] = 0.0
        parts["scores"] = 0.0 if later == "work" else scores
    if "nvml" in row.metric or "driver" in row.note.lower():
        parts["context"] = GIB * figures.step("context_gib")
    return MemoryParts(parts)


def _attention_alone(row: Published, seq_len: int) -> MemoryParts:
    """Operands, results, gradients and two more copies of each on the wire."""
    ranks = 1 if row.method.startswith("kernel") else row.gpus
    tokens = seq_len / ranks
    numbers = (4 * row.heads[0] + 4 * row.heads[1]) * row.head_dim
    return MemoryParts({"operands": NARROW * tokens * numbers, "buffers": WIDE * tokens * numbers})


def layer_bytes(shape: ModelShape, tokens: float) -> float:
    """Activations of one layer that its backward reads, in 16 bits."""
    numbers = 6 * shape.dim + 3 * shape.q_width + 2 * shape.kv_width + 4 * shape.ffn_dim
    return NARROW * tokens * numbers


def _states(row: Published, shape: ModelShape, forward_only: bool) -> dict[str, float]:
    """Weights, gradients and optimizer, and outer weights that are gathered whole."""
    stage, cut = stage_of(row), row.tp * row.pp
    ranks = max(1, row.gpus // cut)
    mine = shape.parameters / cut
    outer = 2 * NARROW * shape.head_parameters / row.tp if stage == 3 and ranks > 1 else 0.0
    weights = NARROW * mine / (ranks if stage == 3 else 1)
    if row.split.get("param_offload", 0.0):
        weights = 0.0
    if forward_only:
        return {"weights": weights, "outer": outer if stage == 3 else 0.0}
    each = float(entry_for("methods", row.method).get("gradient", NARROW))
    grads = each * mine / (ranks if stage >= 2 else 1)
    optimizer = float(source_of(row)["optimizer"]) * mine / (ranks if stage >= 1 else 1)
    offloaded = row.split.get("opt_offload", 0.0) > 0
    if offloaded and ranks == 1:
        grads = 0.0  # they leave as they are made
    if "fsdp" in row.note.lower() or row.method.startswith("fsdp"):
        weights, grads, optimizer = 2 * weights, 2 * grads, optimizer * 2 / 3
    return {
        "weights": weights,
        "gradients": 0.0 if offloaded and row.split.get("param_offload", 0.0) else grads,
        "optimizer": 0.0 if offloaded else optimizer,
        "outer": 2 * outer,
    }


def host_bytes_kept(row: Published, seq_len: float) -> float:
    """Bytes of one GPU's share in host memory."""
    shape = shape_of(row)
    offloaded = row.split.get("act_offload", float(checkpointing_of(row)["offload"]))
    tokens = batch_of(row) * seq_len / (row.cp * row.tp)
    kept = offloaded * NARROW * tokens * shape.dim * shape.layers / row.pp
    states = row.split.get("opt_offload", 0.0) * HOST_STATES * shape.parameters / row.gpus
    return kept + states


def limit_bytes(row: Published, figures: Figures) -> float:
    """Bytes of a GPU that tensors may fill."""
    whole = memory_gib(row.hardware, load_cluster(base_name(row.hardware)))
    return GIB * whole * figures.step("usable_share")


def longest_length(row: Published, figures: Figures, factor: float) -> float:
    """Longest sequence whose peak fits, to one part in a thousand."""
    limit = limit_bytes(row, figures)
    # Of a node that is not full, each GPU has a larger share.
    per_node = row.per_node or 8
    host = HOST_SHARE * GIB * load_cluster(base_name(row.hardware)).host_gib
    host *= per_node / min(per_node, row.gpus)
    low, high = 1, 1 << 32
    while high > low * 1.001 + 1:
        middle = (low + high) // 2
        fits = factor * memory_parts(row, figures, middle).total <= limit
        fits = fits and host_bytes_kept(row, middle) <= host
        low, high = (middle, high) if fits else (low, middle)
    return float(low)
