"""Which rows of attention are cheap to compute again, and the plan that computes them.

Sequence-level selective checkpointing (BurstEngine, arXiv 2509.19836) keeps the attention output of
the second half of a causal sequence and computes the first half again, which is a quarter of the
work for half of the memory. A mask being data, the same holds for any of them: rows are taken in
the order of their allowed pairs until a share of the forward is spent, each rank its own, and the
mask of these rows alone is planned on the same layout.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringattn import methods
from ringattn.cost import price
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.mask import Mask
from ringattn.schedule import Schedule

if TYPE_CHECKING:
    from ringattn.plan import Plan

BLOCK = 128  # rows that a kernel handles at once: ranges are cut at multiples of it
FEWEST_CHUNKS = 64  # shorter sequences are cut finer
MOST_CHUNKS = 1 << 13  # longer ones are cut coarser
TRIALS = 6  # plans priced in search of the largest set of rows
CLOSE = 1.05  # a share within 5 % is good enough


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a plan that are computed again.

    Attributes:
        ranges: int64 (n, 2), query rows [start, stop) of the whole sequence, sorted, disjoint.
        plan: of the mask restricted to these rows, on the plan's layout; None if there are none.
        share: predicted part of the attention forward that it computes again: of the time where
            the context has a cluster, else of the busiest rank's mask area.
    """

    ranges: np.ndarray
    plan: "Plan | None"
    share: float
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def kept_rows(self, plan: "Plan", device: torch.device) -> torch.Tensor:
        """This rank's rows that are not computed again, int64 (rows,) on the device."""
        key = str(device)
        if key not in self._kept:
            tokens = plan.layout.positions(plan.context.rank)
            rows = np.flatnonzero(~_inside(tokens, self.ranges))
            self._kept[key] = torch.from_numpy(rows).to(device)
        return self._kept[key]


def cheap_part(plan: "Plan", share: float) -> Part:
    """The largest set of cheap rows that costs at most a share of the plan's forward.

    Cached in the plan; pure host work, equal on all ranks, so a data loader's thread may call it.
    Sets are priced where the context has a cluster; otherwise the ranks' mask areas are compared.
    Nothing is cheap in a mask whose blocks are selected at run time.

    Args:
        plan: of the whole mask.
        share: of the attention forward, 0 to 1.

    Raises:
        UserError: a share outside [0, 1].
    """
    _check_share(share)
    if share not in plan.parts:
        plan.parts[share] = _build(plan, share)
    return plan.parts[share]


def cheap_rows(mask: Mask, share: float, layout: Layout | None = None) -> np.ndarray:
    """Rows with the fewest allowed pairs, as many as make up a share of the mask's area.

    With a layout each rank takes its own cheapest rows, up to the share of the busiest rank's area:
    every rank then gains what memory it can in that time. Rows are looked at in
    chunks of 128, or less for short sequences, cut also where bands and ranges of the layout begin
    and end; a rank's cheapest chunks come first, earlier ones on a tie.

    Args:
        mask: for blocks selected at run time, no row counts as cheap.
        share: of `mask.area`, 0 to 1.
        layout: who owns which rows; stripes count as one rank.

    Returns:
        int64 (n, 2), query rows [start, stop), sorted, disjoint and not adjoining.
    """
    _check_share(share)
    if mask.routing is not None:
        return np.empty((0, 2), dtype=np.int64)
    chunks = _Chunks.of(mask, layout)
    return chunks.within(share * chunks.busiest)[0]


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"share={share}", "must be in [0, 1]", "pass e.g. 0.25")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Chunks:
    """Chunks of rows in sequence order, and by owner the order of their cost per row.

    Attributes:
        start, stop: rows. order: chunks by owner, an owner's cheapest first.
        spent: allowed pairs of a chunk in `order` and those before it of the same owner.
        busiest: most allowed pairs of an owner.
    """

    start: np.ndarray
    stop: np.ndarray
    order: np.ndarray
    spent: np.ndarray
    busiest: float

    @staticmethod
    def of(mask: Mask, layout: Layout | None) -> "_Chunks":
        start, stop, owner = _cut(mask, layout)
        area = mask.row_area(start, stop)
        order = np.lexsort((area / (stop - start), owner))
        total = np.cumsum(area[order])
        ranked = owner[order]
        first = np.searchsorted(ranked, ranked, side="left")
        spent = total - (total - area[order])[first]
        busiest = float(spent.max(initial=0))
        return _Chunks(start=start, stop=stop, order=order, spent=spent, busiest=busiest)

    def within(self, budget: float) -> tuple[np.ndarray, float]:
        """The rows that each owner can afford, as ranges, and the most that one spends."""
        chosen = self.spent <= budget
        ranges = _ranges(self.start, self.stop, self.order[chosen])
        return ranges, float(self.spent[chosen].max(initial=0))


def _is_whole(layout: Layout) -> bool:
    """Whether neighbouring tokens have one owner."""
    return not (layout.ranges["step"] > 1).any()


def _cut(mask: Mask, layout: Layout | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """start, stop and owner of chunks in sequence order."""
    length = mask.seq_len
    size = BLOCK
    while size > 1 and length < size * FEWEST_CHUNKS:
        size //= 2
    while length > size * MOST_CHUNKS:
        size *= 2
    cuts = np.arange(0, length, size, dtype=np.int64)
    edges = np.unique(np.concatenate([mask.bands["q0"], mask.bands["q1"]]))
    if len(edges) <= max(len(cuts), FEWEST_CHUNKS):
        cuts = np.union1d(cuts, edges[edges < length])
    if layout is None or not _is_whole(layout):
        return cuts, np.append(cuts[1:], length), np.zeros_like(cuts)
    ranges = np.sort(layout.ranges, order="start")
    cuts = np.union1d(cuts, ranges["start"])
    owner = ranges["owner"][np.searchsorted(ranges["start"], cuts, side="right") - 1]
    return cuts, np.append(cuts[1:], length), owner


def _ranges(start: np.ndarray, stop: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Chunks as ranges, those that adjoin joined."""
    chosen = np.sort(chosen)
    start, stop = start[chosen], stop[chosen]
    fresh = np.append(True, start[1:] != stop[:-1])[: len(start)]
    last = np.append(fresh[1:], True)[: len(start)]
    return np.stack([start[fresh], stop[last]], axis=1)


def _inside(tokens: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Whether each token lies in one of the ranges, bool."""
    index = np.searchsorted(ranges[:, 0], tokens, side="right") - 1
    return (index >= 0) & (tokens < np.append(ranges[:, 1], 0)[index])


def _build(plan: "Plan", share: float) -> Part:
    mask = plan.mask
    if plan.context.cluster is not None and mask.routing is None:
        ranges, spent = _largest_in_time(plan, share)
    else:
        ranges, spent = _largest_in_area(plan, share)
    return Part(ranges, _plan_of(plan, ranges) if len(ranges) else None, spent)


def _largest_in_area(plan: "Plan", share: float) -> tuple[np.ndarray, float]:
    """The cheap rows, and the share of the busiest rank's area that a rank computes again."""
    if plan.mask.routing is not None:
        return cheap_rows(plan.mask, share), 0.0
    chunks = _Chunks.of(plan.mask, plan.layout)
    ranges, spent = chunks.within(share * chunks.busiest)
    return ranges, spent / max(chunks.busiest, 1.0)


def _largest_in_time(plan: "Plan", share: float) -> tuple[np.ndarray, float]:
    """The most rows whose restricted forward is predicted to stay within the share, and its share.

    What a rank may spend is scaled by the prediction, or halved where that leads nowhere.
    """
    cluster = plan.context.cluster
    assert cluster is not None
    kernel = plan.context.kernel if plan.context.kernel in cluster.kernels else None
    whole = max(price(plan.forward, cluster, kernel).seconds, 1e-30)
    chunks = _Chunks.of(plan.mask, plan.layout)
    low, high = 0.0, chunks.busiest
    best, spent, budget = chunks.within(-1)[0], 0.0, share * chunks.busiest
    for _ in range(TRIALS):
        ranges, _ = chunks.within(budget)
        part = price(_forward(plan, ranges), cluster, kernel).seconds / whole
        if part <= share:
            best, spent, low = ranges, part, budget
        else:
            high = budget
        if low >= high or (part <= share < part * CLOSE):
            break
        scaled = 0.98 * budget * share / part if part else high  # aims a little low
        budget = scaled if low < scaled < high else (low + high) / 2
    return best, spent


def _forward(plan: "Plan", ranges: np.ndarray) -> Schedule:
    posed = plan.context.problem(plan.mask.restrict_queries(ranges), plan)
    return methods.by_name(plan.method).forward(posed)


def _plan_of(plan: "Plan", ranges: np.ndarray) -> "Plan":
    """The plan of the rows alone, by the same method on the same layout."""
    mask = plan.mask.restrict_queries(ranges)
    posed = plan.context.problem(mask, plan)
    method = methods.by_name(plan.method)
    schedules = method.forward(posed), method.backward(posed)
    return type(plan)(plan.context, mask, plan.layout, plan.method, schedules, plan.settings)
