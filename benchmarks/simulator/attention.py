"""Attention of a published row: its plans, surveyed once, priced for any figures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ringattn.benchmarks.calibration_plans import schedules_of
from ringattn.benchmarks.calibration_rows import Row
from ringattn.benchmarks.simulator.figures import (
    DIRECTIONS,
    Figures,
    curve_names,
    generation,
    link_names,
)
from ringattn.benchmarks.simulator.mask_names import masks_named
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.tables import base_name, entry_for, hardware
from ringattn.cost import Cluster, Survey, price_survey, survey
from ringattn.cost.kernel_time import partial_share
from ringattn.errors import UserError
from ringattn.schedule import Direction

MOST_RANKS = 4096
"""Of one sequence that are planned."""
_KEPT = 4096
"""Prices that are remembered."""


@dataclass(frozen=True)
class Attention:
    """One attention call of a group of ranks.

    Attributes:
        plan: what imitates the method. heads, head_dim, seq_len, source, mask: of the call.
        world: ranks of the group. node: of them in one node. gpus: that the mask was drawn for.
    """

    plan: str
    heads: tuple[int, int]
    head_dim: int
    seq_len: int
    source: str
    mask: str
    world: int
    node: int
    gpus: int


def attention_of(row: Published) -> Attention:
    """The attention call of a row, of one rank group."""
    entry = entry_for("methods", row.method)
    cp, tp = row.cp, row.tp
    if row.kind == "attention":
        cp = 1 if entry["plan"] == "local" else row.gpus
    if cp > MOST_RANKS:
        raise UserError(f"{cp} ranks", f"are more than the {MOST_RANKS} of a plan", "state fewer")
    heads = max(1, row.heads[0] // tp), max(1, row.heads[1] // tp)
    plan = "local" if cp == 1 else str(entry["plan"])
    return Attention(
        plan=plan, heads=heads, head_dim=row.head_dim, seq_len=row.seq_len,
        source=row.source if row.source.startswith("ring-flash") else "", mask=row.mask, world=cp,
        node=max(1, min((row.per_node or 8) // tp, cp)), gpus=cp,
    )  # fmt: skip


def kernel_of(row: Published) -> str:
    """The kernel that a row's system runs: as its note or method says, else the usual one."""
    modern = generation(base_name(row.hardware))
    stated = re.search(r"kernel[=-]([a-z0-9\-]+)", f"{row.note.lower()} {row.method.lower()}")
    name = stated.group(1) if stated else ""
    alone = row.method.lower().startswith("kernel") or row.cp == 1 or row.gpus == 1
    if "magi" in row.method.lower():
        name = "ffa"
    if name.startswith("ffa") or name == "fa4":
        return "ffa-fa4" if modern == "blackwell" else "ffa"
    if name in ("fa3", "cudnn", "fa2"):
        return "fa3_unfused" if name == "fa3" and not alone else name
    if row.method.lower().startswith("kernel-") and name not in ("", "sdpa", "fa", "flash"):
        return name
    if modern == "ampere" or re.search(r"ring.?flash|burst|alst|arctic", row.source.lower()):
        return "fa2"
    if row.method.lower().startswith("upipe"):
        return "fa3"
    if modern == "blackwell":
        return "cudnn"
    return "cudnn" if "nemo" in row.source.lower() else "fa2" if row.shape else "fa3_unfused"


@dataclass(frozen=True, eq=False)
class Counted:
    """One direction of a plan, counted.

    Attributes:
        survey: what it asks for. partial: as in `ringattn.cost.kernel_time.partial_share`.
    """

    survey: Survey
    partial: float


def counted_in(call: Attention, directions: Sequence[str]) -> list[list[Counted]]:
    """A call's plans in some directions: one entry per mask, one of each direction."""
    alone = call.world == 1 and len(directions) == 1
    both = counted_of(call, tuple(directions) if alone else DIRECTIONS)
    return [[one for one in found if one.survey.direction in directions] for found in both]


@lru_cache(maxsize=1024)
def counted_of(
    call: Attention, directions: tuple[Direction, ...]
) -> tuple[tuple[Counted, ...], ...]:
    """A call's plans: one entry per mask, one of each direction."""
    found = []
    for mask in masks_named(call.source, call.mask, call.seq_len, call.gpus):
        schedules = None
        for plan in (call.plan, "usp-headfirst", "ring"):
            row = Row(
                source=call.source, hardware="", gpus=call.world, heads=call.heads,
                head_dim=call.head_dim, seq_len=call.seq_len, mask=call.mask, method=plan,
                directions=directions, tflops=1.0,
            )  # fmt: skip
            try:
                schedules = schedules_of(row, mask, call.node)
                break
            except UserError:  # heads that so many ranks cannot share
                continue
        if schedules is None:
            raise UserError(f"{call.plan} over {call.world} ranks", "cannot be planned", "no plan")
        blocks = {"forward": (128, 128), "backward": (64, 128)}
        found.append(
            tuple(
                Counted(survey(s, *blocks[s.direction]), partial_share(s, *blocks[s.direction]))
                for s in schedules
            )
        )
    return tuple(found)


class Prices:
    """Prices of attention under one set of figures.

    Args:
        figures: of clusters and kernels. known: prices that other sets of figures may share.
    """

    def __init__(self, figures: Figures, known: dict | None = None) -> None:
        self.figures = figures
        self._known: dict[tuple, tuple[float, float]] = {} if known is None else known

    def cluster(self, row: Published, node: int) -> Cluster:
        """What a row ran on, with `node` ranks of a group in a node."""
        base = self.figures.cluster(base_name(row.hardware), kernel_of(row))
        return hardware(row.hardware, base, node)

    def _state(self, row: Published, directions: Sequence[str]) -> tuple:
        """What a price depends on: the cluster's name, the kernel's, and their figures."""
        names = figures_of(row, directions)
        return (base_name(row.hardware), kernel_of(row), *(self.figures[name] for name in names))

    def seconds(
        self, row: Published, call: Attention, directions: Sequence[str]
    ) -> tuple[float, float]:
        """Seconds of the slowest rank, mean over the masks, and TFLOP/s per rank, likewise."""
        node = max(1, (row.per_node or 8) // row.tp)
        cluster = self.cluster(row, node)
        key = (call, tuple(directions), node, entry_key(row), self._state(row, directions))
        if key not in self._known:
            times, speeds = [], []
            for found in counted_in(call, directions):
                mine = [one.survey for one in found]
                curves = cluster.kernels[cluster.kernel]
                spent = sum(
                    price_survey(s, cluster, curves.curve(s.direction)).seconds for s in mine
                )
                times.append(spent)
                speeds.append(sum(s.flops for s in mine) / (1e12 * call.world * spent))
            self._known[key] = float(np.mean(times)), float(np.mean(speeds))
        return self._known[key]


def partial_of(row: Published) -> float:
    """Share of the computed pairs of a row's attention in tiles which an edge of the mask cuts,
    the mean: kernels run these at another speed than whole tiles."""
    counted = counted_in(attention_of(row), row.directions)
    return float(np.mean([one.partial for found in counted for one in found]))


def figures_of(row: Published, directions: Sequence[str]) -> list[str]:
    """Names of the figures that the price of a row's attention depends on."""
    cluster, kernel = base_name(row.hardware), kernel_of(row)
    names = link_names(cluster) if row.gpus > 1 else []
    for direction in directions:
        names += curve_names(cluster, kernel, direction)
    return names


def entry_key(row: Published) -> str:
    """What tells clusters of one base apart."""
    return str(entry_for("hardware", row.hardware)["match"])


def exact_area(call: Attention) -> float:
    """Allowed pairs of the call's masks, the mean."""
    masks = masks_named(call.source, call.mask, call.seq_len, call.gpus)
    return float(np.mean([mask.area for mask in masks]))
