"""Simulates a training step of our own trainer: any model, mask, method, engine and cluster.

    from ringattn.benchmarks.simulate_step import simulate_step
    step = simulate_step("llama3-8b", 1 << 20, "causal", method="usp", gpus=512, cp=64)
    step.seconds.total, step.tflops, step.mfu, step.tokens_per_s, step.memory.peak.nbytes

The plan of one context-parallel group is built and priced as it would be executed. Groups are
replicas: they attend to other sequences of the same mask, so that one group's price stands for all,
and only the engine's collectives and the optimizer see the whole cluster.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import torch

import ringattn as ra
from ringattn.benchmarks.simulator.mask_names import is_known, masks_named
from ringattn.benchmarks.simulator.tables import entry_for
from ringattn.cost import Cluster, Survey, load_cluster, price_survey, survey
from ringattn.cost.attention_memory import attention_bytes
from ringattn.cost.price import straggling
from ringattn.cost.step_memory import StepMemory, step_memory
from ringattn.cost.step_shapes import (
    AttentionBytes,
    Checkpointing,
    Engine,
    ModelShape,
    StepSettings,
)
from ringattn.cost.step_time import AttentionSeconds, StepSeconds, model_flops, step_seconds
from ringattn.errors import UserError
from ringattn.launch.step_model import busiest_rank
from ringattn.masks import Mask
from ringattn.selective import cheap_part

LONGEST = 1 << 32
"""Tokens of a sequence whose layout is planned."""
LARGEST_GROUP = 64
"""Ranks of a context-parallel group where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class SimulatedStep:
    """A predicted optimizer step.

    Attributes:
        gpus, cp: all ranks, and those that share a sequence. tokens: of the step, all ranks.
        method, layout: of the attention's plan. seconds: of the step, part by part.
        memory: of the busiest rank, part by part. fits: whether it stays below the GPU's memory.
        flops: of the step, all ranks, as MFU counts them. peak_tflops: of one GPU.
        received: bytes that the busiest rank receives in one layer's attention.
    """

    gpus: int
    cp: int
    tokens: int
    method: str
    layout: str
    seconds: StepSeconds
    memory: StepMemory
    fits: bool
    flops: float
    peak_tflops: float
    received: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / (self.gpus * self.seconds.total)

    @property
    def tflops(self) -> float:
        """TFLOP/s per GPU: exact mask area, nothing that is computed again."""
        return self.flops / (1e12 * self.gpus * self.seconds.total)

    @property
    def mfu(self) -> float:
        """Share of the peak."""
        return self.tflops / self.peak_tflops


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan of one group, counted once: prices on any cluster follow from it."""

    method: str
    layout: str
    surveys: tuple[Survey, Survey]
    bytes_: AttentionBytes
    tokens: int
    again: float
    area: int


def simulate_step(
    model: str | ModelShape,
    seq_len: int,
    mask: str | Mask = "causal",
    *,
    method: str = "auto",
    engine: Engine = "fsdp",
    checkpointing: Checkpointing = "full",
    gpus: int = 8,
    cluster: str | Cluster = "h100_sxm",
    cp: int | None = None,
    micro_batches: int = 1,
    settings: Mapping[str, object] | None = None,
) -> SimulatedStep:
    """Predicts a step; pure host work.

    Args:
        model: a name of `configs/calibration/models.yaml`, or sizes.
        seq_len: tokens of one sequence. mask: over it, by name or as an object.
        method: a plan generator, or "auto". engine, checkpointing: as in a configuration.
        gpus: all ranks. cp: those that share a sequence; default all, at most 64.
        cluster: a shipped name, a file, or a description.
        micro_batches: sequences of each group per optimizer step.
        settings: further fields of `StepSettings`, e.g. {"token_tile": 4096}.

    Raises:
        UserError: arguments that cannot work together, or a method that cannot plan.
    """
    shape, where = shape_named(model), cluster_named(cluster)
    group = min(gpus, LARGEST_GROUP) if cp is None else cp
    if not 1 <= seq_len <= LONGEST:
        raise UserError(f"seq_len={seq_len}", f"must be 1 to {LONGEST}", "pass another")
    if group < 1 or gpus < 1 or gpus % group:
        raise UserError(f"cp={group}", f"must divide the {gpus} GPUs", "pass another cp")
    for name, value, known in (
        ("engine", engine, get_args(Engine)),
        ("checkpointing", checkpointing, get_args(Checkpointing)),
    ):
        if value not in known:
            raise UserError(f"{name}={value!r}", f"must be one of {', '.join(known)}", "pick one")
    plan = planned(shape, seq_len, mask, method, group, where, checkpointing)
    return priced_step(
        plan, shape, where, gpus=gpus, cp=group, seq_len=seq_len, engine=engine,
        checkpointing=checkpointing, micro_batches=micro_batches, settings=settings,
    )  # fmt: skip


def shape_named(model: str | ModelShape) -> ModelShape:
    """The sizes of a model's name."""
    if isinstance(model, ModelShape):
        return model
    known = entry_for("models", model)
    if not known["match"]:
        raise UserError(f"model={model!r}", "is unknown", "name it with its size, as llama3-8b")
    width = known["hidden"]
    return ModelShape(
        layers=known["layers"], dim=width, heads=known["heads_q"], kv_heads=known["heads_kv"],
        head_dim=known.get("head_dim", width // known["heads_q"]), ffn_dim=known["ffn"],
        vocab_size=known["vocab"], tied=False,
    )  # fmt: skip


def cluster_named(cluster: str | Cluster) -> Cluster:
    """A cluster by its name or path. Raises UserError for one that is neither."""
    return cluster if isinstance(cluster, Cluster) else load_cluster(cluster)


def planned(
    shape: ModelShape,
    seq_len: int,
    mask: str | Mask,
    method: str,
    group: int,
    cluster: Cluster,
    checkpointing: Checkpointing = "full",
) -> Planned:
    """Plans one group's attention and counts what it asks for."""
    made = mask if isinstance(mask, Mask) else _mask(mask, seq_len, group)
    if made.seq_len != seq_len:
        raise UserError(f"mask of {made.seq_len} tokens", f"must have {seq_len}", "give another")
    context = ra.ContextParallel(
        group, heads=(shape.heads, shape.kv_heads), head_dim=shape.head_dim, method=method,
        dtype=torch.bfloat16, cluster=cluster,
    )  # fmt: skip
    plan = context.plan(made)
    rank = busiest_rank(plan)
    curves = cluster.kernel_named(None)
    counts = [
        survey(s, curves.curve(s.direction).block_rows, curves.curve(s.direction).block_keys)
        for s in (plan.forward, plan.backward)
    ]
    tokens = int(plan.layout.sizes[rank])
    again, kept = 0.0, 1.0
    if checkpointing == "sequence":
        part = cheap_part(plan, StepSettings.recompute)
        own = plan.layout.positions(rank)
        again = part.share
        kept -= sum(int(((own >= a) & (own < b)).sum()) for a, b in part.ranges) / max(tokens, 1)
    kernel = "cpu_flash" if cluster.kernel == "cpu_flash" else "flash"
    bytes_ = attention_bytes(
        (plan.forward, plan.backward), rank, tokens, kernel=kernel, kept_rows=kept
    )
    return Planned(
        plan.method, plan.layout.name, (counts[0], counts[1]), bytes_, tokens, again, made.area
    )


@lru_cache(maxsize=64)
def _mask(name: str, seq_len: int, group: int) -> Mask:
    """A mask by name; of several packs the middle one. Raises UserError for an unknown name."""
    if not is_known(name):
        raise UserError(
            f"mask={name!r}", "is unknown", "name its kind, as causal, doc_causal or window_1024"
        )
    found = masks_named("", name, seq_len, group)
    return found[len(found) // 2]


@lru_cache(maxsize=256)
def _memory(shape: ModelShape, how: StepSettings, bytes_: AttentionBytes) -> StepMemory:
    """The step's memory, which links do not change."""
    return step_memory(shape, how, bytes_)


def priced_step(
    plan: Planned,
    shape: ModelShape,
    cluster: Cluster,
    *,
    gpus: int,
    cp: int,
    seq_len: int,
    engine: Engine = "fsdp",
    checkpointing: Checkpointing = "full",
    micro_batches: int = 1,
    settings: Mapping[str, object] | None = None,
) -> SimulatedStep:
    """A step of `gpus` ranks whose groups of `cp` all run a plan."""
    how = StepSettings(
        tokens=plan.tokens, ranks=gpus, micro_batches=micro_batches, engine=engine,
        checkpointing=checkpointing, device="cpu" if cluster.kernel == "cpu_flash" else "cuda",
    )  # fmt: skip
    how = replace(how, **dict(settings or {}))
    curves = cluster.kernel_named(None)
    both = [price_survey(s, cluster, curves.curve(s.direction)) for s in plan.surveys]
    # The slowest of all ranks, not of one group's alone.
    late = straggling(cluster, gpus) / straggling(cluster, cp)
    attention = AttentionSeconds(
        forward=late * both[0].seconds, backward=late * both[1].seconds, again=plan.again
    )
    memory = _memory(shape, how, plan.bytes_)
    kept = 0.0
    if how.offload_kept:
        kept = memory.host - _memory(shape, replace(how, offload_kept=False), plan.bytes_).host
    seconds = step_seconds(shape, how, cluster, attention, kept_bytes=kept)
    groups = gpus // cp
    tokens = groups * micro_batches * seq_len
    return SimulatedStep(
        gpus=gpus, cp=cp, tokens=tokens, method=plan.method, layout=plan.layout, seconds=seconds,
        memory=memory, fits=memory.peak.nbytes <= 0.94 * 2**30 * cluster.memory_gib,
        flops=model_flops(shape, tokens, groups * micro_batches * plan.area),
        peak_tflops=cluster.peak_tflops,
        received=float((both[0].received + both[1].received).sum(axis=0).max()),
    )  # fmt: skip
