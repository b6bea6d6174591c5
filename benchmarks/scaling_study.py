"""A simulated scaling study: weak and strong scaling, and what faster links would bring.

    python -m ringattn.benchmarks.scaling_study [--model llama3-8b] [--cluster h100_sxm]
        [--gpus 8 4096] [--masks ...] [--methods ...] [--json FILE]

Every (mask, method) is planned once per context-parallel group and priced for 8, 16, ... 4,096
GPUs. Groups hold at most `--group` ranks (64); more GPUs are more groups. Their sequences are
alike, so that one group's exact price stands for all but for the slowest rank's lateness, which
grows with the number of GPUs; packs of documents that differ between groups would cost more. Weak
scaling keeps 16,384 tokens per GPU, strong scaling 64 sequences of 1,048,576 tokens per step.
Sensitivity prices the same plans on clusters with links of half and twice the bandwidth, and of a
quarter and four times the latency. A method that cannot plan a case is refused with its reason,
never left out.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringattn.benchmarks.simulate_step import (
    LARGEST_GROUP,
    Planned,
    cluster_named,
    planned,
    priced_step,
    shape_named,
)
from ringattn.cost import Cluster, Link
from ringattn.cost.step_shapes import ModelShape
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.methods import METHODS

MASKS = ("full", "causal", "doc_causal", "shared_question", "sliding_window_causal_4096")
TOKENS_PER_GPU, STRONG_LENGTH, STRONG_SEQUENCES = 16384, 1 << 20, 64


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--cluster", default="h100_sxm")
    parser.add_argument("--gpus", type=int, nargs=2, default=(8, 4096), metavar=("MIN", "MAX"))
    parser.add_argument("--masks", nargs="+", default=MASKS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS))
    parser.add_argument("--group", type=int, default=LARGEST_GROUP, help="most ranks of a sequence")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        counts = doubled(*args.gpus)
        cells = list(
            study(
                args.model,
                args.cluster,
                counts=counts,
                masks=args.masks,
                methods=args.methods,
                group=args.group,
            )
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(cells, indent=1), encoding="utf-8")
    print(report(cells, counts))
    refused = [c for c in cells if c["status"] != "ok"]
    print(f"{len(cells)} cells, {len(refused)} refused, {time.perf_counter() - start:.0f} s")
    return 0


@dataclass(frozen=True)
class Load:
    """What scales: tokens of a GPU (weak); length and number of a step's sequences (strong)."""

    weak: int = TOKENS_PER_GPU
    seq_len: int = STRONG_LENGTH
    sequences: int = STRONG_SEQUENCES


def doubled(low: int, high: int) -> list[int]:
    """Counts from `low` to `high`, each twice the one before."""
    if low < 1 or high < low or high % low or (high // low).bit_count() != 1:
        raise UserError(
            f"gpus {low} to {high}", "must be 1, 2, 4, 8, … times the smaller count", "e.g. 8 4096"
        )
    return [low << step for step in range((high // low).bit_length())]


def study(
    model: str | ModelShape,
    cluster: str | Cluster,
    *,
    counts: Sequence[int],
    masks: Sequence[str] = MASKS,
    methods: Sequence[str] = tuple(METHODS),
    group: int = LARGEST_GROUP,
    load: Load | None = None,
    make: Callable[[str, int], Mask] | None = None,
) -> Iterator[dict[str, Any]]:
    """Every cell of the study, as JSON takes it: status, and figures or the reason of a refusal.

    Args:
        model, cluster: by name or as objects. counts: of GPUs. masks, methods: by name.
        group: most ranks of a sequence. load: what a step holds.
        make: a mask from its name and length; else names are those of published tables.
    """
    load = load or Load()
    shape, where = shape_named(model), cluster_named(cluster)
    for mask in masks:
        for method in methods:
            known: dict[tuple[int, int], Planned | str] = {}
            for kind in ("weak", "strong"):
                for gpus in counts:
                    yield from _cells(
                        kind, gpus, group, (mask, make), method, shape, where, known, load
                    )


def _cells(
    kind: str,
    gpus: int,
    group: int,
    named: tuple[str, Callable[[str, int], Mask] | None],
    method: str,
    shape: ModelShape,
    cluster: Cluster,
    known: dict[tuple[int, int], Planned | str],
    load: Load,
) -> Iterator[dict[str, Any]]:
    """One point, on the cluster and, for the largest weak one, on others of other links."""
    cp, (mask, make) = min(gpus, group), named
    seq_len = load.weak * cp if kind == "weak" else load.seq_len
    runs = 1 if kind == "weak" else max(1, load.sequences * cp // gpus)
    if (cp, seq_len) not in known:
        try:
            made = make(mask, seq_len) if make else mask
            known[cp, seq_len] = planned(shape, seq_len, made, method, cp, cluster)
        except UserError as error:
            known[cp, seq_len] = str(error)
    plan = known[cp, seq_len]
    cell = {"kind": kind, "gpus": gpus, "cp": cp, "mask": mask, "method": method,
            "seq_len": seq_len, "links": "as they are"}  # fmt: skip
    if isinstance(plan, str):
        yield cell | {"status": "refused", "reason": plan}
        return
    variants = {"as they are": cluster}
    if kind == "weak" and gpus >= group:
        variants |= other_links(cluster)
    for name, where in variants.items():
        step = priced_step(
            plan, shape, where, gpus=gpus, cp=cp, seq_len=seq_len, micro_batches=runs
        )
        yield cell | {
            "status": "ok", "links": name, "layout": step.layout, "step_s": step.seconds.total,
            "tokens_per_s_per_gpu": step.tokens_per_s, "tflops_per_gpu": step.tflops,
            "mfu": step.mfu, "received": step.received,
            "peak_gib": step.memory.peak.nbytes / 2**30, "fits": step.fits,
        }  # fmt: skip


def other_links(cluster: Cluster) -> Mapping[str, Cluster]:
    """The cluster with slower and faster links, and with shorter and longer latencies."""

    def scaled(link: Link, rate: float, latency: float) -> Link:
        return replace(link, gbs=link.gbs * rate, latency_us=link.latency_us * latency)

    factors = {
        "half the bandwidth": (0.5, 1.0), "twice the bandwidth": (2.0, 1.0),
        "a quarter of the latency": (1.0, 0.25), "four times the latency": (1.0, 4.0),
    }  # fmt: skip
    return {
        name: replace(
            cluster,
            intra=scaled(cluster.intra, rate, latency),
            inter=scaled(cluster.inter, rate, latency),
        )
        for name, (rate, latency) in factors.items()
    }


def report(cells: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> str:
    """MFU by mask, method and number of GPUs, and by links at the largest number."""
    lines = []
    for kind in ("weak", "strong"):
        lines.append(f"{kind} scaling, simulated: MFU in % by GPUs")
        lines.append(f"  {'mask':28}{'method':14}" + "".join(f"{gpus:7}" for gpus in counts))
        rows: dict[tuple[str, str], dict[int, str]] = {}
        for cell in cells:
            if cell["kind"] == kind and cell["links"] == "as they are":
                shown = f"{100 * cell['mfu']:.1f}" if cell["status"] == "ok" else "-"
                rows.setdefault((cell["mask"], cell["method"]), {})[cell["gpus"]] = shown
        for (mask, method), figures in rows.items():
            shown = "".join(f"{figures.get(gpus, ''):>7}" for gpus in counts)
            lines.append(f"  {mask:28}{method:14}{shown}")
    lines.append(f"sensitivity: change of tokens/s at {max(counts)} GPUs, weak scaling")
    base = {
        (c["mask"], c["method"]): c["tokens_per_s_per_gpu"]
        for c in cells
        if _is_largest(c, counts) and c["links"] == "as they are"
    }
    for cell in cells:
        if _is_largest(cell, counts) and cell["links"] != "as they are":
            change = cell["tokens_per_s_per_gpu"] / base[cell["mask"], cell["method"]] - 1
            lines.append(f"  {cell['mask']:28}{cell['method']:14}{cell['links']:26}{change:+7.1%}")
    return "\n".join(lines)


def _is_largest(cell: Mapping[str, Any], counts: Sequence[int]) -> bool:
    return cell["status"] == "ok" and cell["kind"] == "weak" and cell["gpus"] == max(counts)


if __name__ == "__main__":
    sys.exit(main())
