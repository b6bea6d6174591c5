"""From what ranks report to what is recorded."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from ringattn.benchmarks.record import read_records
from ringattn.benchmarks.training.case import RankReport, TrainCase
from ringattn.benchmarks.training.peak import PeakRate
from ringattn.launch.config import Config
from ringattn.launch.feed import layer_masks
from ringattn.launch.flops import flops_per_step
from ringattn.launch.job import open_split
from ringattn.launch.packing import Batches


@dataclass(frozen=True)
class Reference:
    """A contender that ran to its end, and its losses."""

    contender: str
    losses: list[float]


@dataclass(frozen=True)
class StepFigures:
    """Of the measured steps: tokens per second of all ranks, their spread, and the other figures.

    Attributes:
        rate, spread: median, and half the interquartile range.
        figures: of a record; see `step_figures`.
    """

    rate: float
    spread: float
    figures: dict[str, float | None]

    def line(self) -> str:
        """For people."""
        found = self.figures
        parts = [
            f"{self.rate:,.0f} tokens/s",
            f"{found['tokens_per_cpu_second']:,.0f} per CPU second",
        ]
        if found["mfu"] is not None:
            parts.append(f"MFU {found['mfu']:.0%}")
        if found["peak_bytes"] is not None:
            parts.append(f"peak {found['peak_bytes'] / 2**20:,.0f} MiB")
        return ", ".join([*parts, f"loss {found['loss']:.4f}"])


def describe(case: TrainCase, contender: str, command: str, device: str) -> dict[str, Any]:
    """The ``config`` of a record: what is the same for all contenders, and who this is.

    ``group`` is equal for runs whose losses have to be equal.
    """
    config = case.config(1, {})
    shape = case.shape(config)
    # Neither changes a loss: where the corpus lies and how long ranks wait.
    apart = ("run.", "data.path")
    values = {key: value for key, value in case.values.items() if not key.startswith(apart)}
    what = {"values": values, "packs": case.packs, "vocab_size": shape.vocab_size}
    text = json.dumps([what, device], sort_keys=True)
    return {
        "suite": "train",
        "contender": contender,
        "mask": "documents_causal",
        "seq_len": config.data.seq_len,
        "ranks": case.ranks,
        "heads": [shape.heads, shape.kv_heads],
        "head_dim": shape.head_dim,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.train.dtype],
        "batch": case.packs,
        "direction": "both",
        "device": device,
        "simulated": False,
        "command": command,
        "model": {
            "layers": shape.layers,
            "dim": shape.dim,
            "ffn_dim": shape.ffn_dim,
            "vocab_size": shape.vocab_size,
        },
        "warm_up": case.warmup,
        "steps": config.train.steps - case.warmup,
        "group": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def reference_of(path: str | PathLike[str], name: str, group: str) -> Reference | None:
    """The first contender of a group in a file of records that has figures; None without one."""
    for record in read_records(path):
        config = record.config
        if record.name == name and record.status == "ok" and config.get("group") == group:
            return Reference(config["contender"], config["losses"])
    return None


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of two runs' losses; infinite where they are not comparable."""
    if len(losses) != len(reference) or not all(map(math.isfinite, (*losses, *reference))):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def step_flops(case: TrainCase, config: Config) -> list[int]:
    """Operations of each measured step over all ranks, attention by its masks' exact area."""
    dataset, shape = open_split(config, "train"), case.shape(config)
    batches = Batches(stages=config.data.stages, accumulate=case.packs)
    found = []
    for step in range(case.warmup, config.train.steps):
        areas = np.zeros(shape.layers, dtype=object)
        for start in batches.starts(step).flat:
            lengths = dataset.lengths(int(start), config.data.seq_len)
            areas += [mask.area for mask in layer_masks(lengths, shape.windows)]
        found.append(flops_per_step(shape, batches.tokens(step), [int(area) for area in areas]))
    return found


def step_figures(
    case: TrainCase, reports: Sequence[RankReport], flops: Sequence[int], peak: PeakRate | None
) -> StepFigures:
    """Figures of the measured steps.

    A step's wall seconds are those of the slowest rank, its CPU seconds the sum over ranks: on a
    machine that others use too they are the ones to read. Peak bytes are of the rank with most.
    ``mfu_cpu`` is the share of what the ranks' CPU time could have computed.
    """
    tokens = case.packs * case.values["data.seq_len"]
    wall = np.max([report.wall_s for report in reports], axis=0)[case.warmup :]
    cpu = np.sum([report.cpu_s for report in reports], axis=0)[case.warmup :]
    rates = tokens / wall
    upper, lower = np.percentile(rates, [75, 25])
    peaks = [report.peak_bytes for report in reports if report.peak_bytes is not None]
    seconds, cpu_seconds = float(np.median(wall)), float(np.median(cpu))
    mfu = mfu_cpu = None
    if peak is not None:
        mfu = float(np.median(np.divide(flops, wall))) / peak.flops
        if peak.core_flops is not None:
            mfu_cpu = float(np.median(np.divide(flops, cpu))) / peak.core_flops
    figures: dict[str, float | None] = {
        "seconds": seconds,
        "step_seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "mfu": mfu,
        "mfu_cpu": mfu_cpu,
        "peak_bytes": max(peaks, default=None),
        "loss": reports[0].losses[-1],
    }
    return StepFigures(tokens / seconds, float(upper - lower) / 2, figures)
