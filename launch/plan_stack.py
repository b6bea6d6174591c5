"""What ``ringattn plan`` prices beyond one mask: layers with windows, and steps at many degrees."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.degree_feed import simulated_degrees
from ringattn.launch.feed import layer_masks, step_batches
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import PackedDataset
from ringattn.launch.plan_report import plan_json, plan_table
from ringattn.launch.progress import format_degrees
from ringattn.planner import Comparison


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The layers of one mask.

    Attributes:
        windows: of these layers; windows that cut nothing off share the mask of None.
        layers: how many.
        mask: of all of them.
        comparison: candidates on the stack's layout, or on any where all layers are alike.
        plan: the best of them.
    """

    windows: tuple[int | None, ...]
    layers: int
    mask: ra.Mask
    comparison: Comparison
    plan: ra.Plan

    @property
    def seconds(self) -> float:
        """Predicted for all these layers and one pack, forward and backward."""
        return self.layers * self.comparison.best.seconds

    def __str__(self) -> str:
        shown = ["whole documents" if w is None else f"a window of {w}" for w in self.windows]
        return f"{self.layers} layers of {' or '.join(shown)}"


def layer_kinds(
    context: ra.ContextParallel, lengths: list[int], windows: Sequence[int | None]
) -> list[LayerKind]:
    """Prices each distinct mask of a stack of layers; the one that takes longest comes first."""
    masks = layer_masks(lengths, windows)
    counts = Counter(masks)
    plans = dict(zip(masks, context.plans(masks), strict=True))
    layout = plans[masks[0]].layout if len(counts) > 1 else None
    kinds = [
        LayerKind(
            windows=tuple(
                dict.fromkeys(w for w, own in zip(windows, masks, strict=True) if own == mask)
            ),
            layers=count,
            mask=mask,
            comparison=context.compare(mask, exhaustive=True, layout=layout),
            plan=plans[mask],
        )
        for mask, count in counts.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.seconds)


def kinds_json(kinds: list[LayerKind]) -> dict[str, Any]:
    """As `plan_json` of the kind that takes longest; `layers` holds all where there are more."""
    found = plan_json(kinds[0].comparison)
    if len(kinds) > 1:
        found["layers"] = [
            {"windows": list(kind.windows), "layers": kind.layers} | plan_json(kind.comparison)
            for kind in kinds
        ]
    return found


def kinds_table(kinds: list[LayerKind], packs: int) -> Iterator[str]:
    """Lines of every kind's table, then what a step's `packs` per rank take in all."""
    for kind in kinds:
        if len(kinds) > 1:
            layout = kind.comparison.best.layout.name
            yield f"{kind}, on the stack's layout ({layout}):"
        yield from plan_table(kind.comparison)
    if len(kinds) == 1:
        count = kinds[0].layers * packs
        total = count * kinds[0].comparison.best.seconds
        yield f"attention of a training step: {count} × that = {1e3 * total:.4g} ms"
        return
    parts = " + ".join(f"{k.layers} × {1e3 * k.comparison.best.seconds:.4g}" for k in kinds)
    total = packs * sum(kind.seconds for kind in kinds)
    yield f"attention of a training step: {packs} × ({parts}) = {1e3 * total:.4g} ms"


def degrees_json(config: Config, shape: ModelConfig, dataset: PackedDataset) -> dict[str, Any]:
    """The schedule of the first step's packs, as plain values; seconds are of a whole step.

    The schedule is the one that training chooses, by estimates; its seconds come from plans.
    `samples_s` is what pricing sample packs took here, once, and `planning_s` what scheduling the
    step took: every rank's loader does it for every step, beside the training.
    """
    batches = step_batches(config, 0, 0)
    degrees = simulated_degrees(config, shape, dataset)
    starts, seq_len = batches.starts(0), batches.seq_len(0)
    times = [time.perf_counter()]
    degrees.price(starts, seq_len)
    times.append(time.perf_counter())
    priced = degrees.price(starts, seq_len)
    times.append(time.perf_counter())
    schedule = degrees.judge(priced)
    return {
        "samples_s": times[1] - times[0],
        "planning_s": times[2] - times[1],
        "degrees": [entry.degree for entry in schedule.rounds],
        "step_s": schedule.seconds,
        "plain_step_s": schedule.plain_seconds,
        "gain": schedule.gain,
    }


def degrees_line(found: dict[str, Any], packs: int) -> str:
    """One sentence about `degrees_json`."""
    step, plain = 1e3 * found["step_s"], 1e3 * found["plain_step_s"]
    planned = (
        f"; scheduled in {1e3 * found['planning_s']:.2g} ms after {found['samples_s']:.2g} s "
        "for sample packs"
    )
    if not found["gain"]:
        text = f"no gain from fewer ranks per pack, {plain:.4g} ms"
    else:
        text = (
            f"rounds x degree {format_degrees(found['degrees'])}, {step:.4g} ms in place of "
            f"{plain:.4g} ms ({100 * found['gain']:.1f} % less)"
        )
    return f"the first step's {packs} packs: {text}{planned}"
