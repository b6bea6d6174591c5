"""Which rows of attention are cheap to compute again, and the plan that computes them.

Sequence-level selective checkpointing (BurstEngine, arXiv 2509.19836) keeps the attention output of
the second half of a causal sequence and computes the first half again, which is a quarter of the
work for half of the memory. A mask being data, the same holds for any of them: rows are taken in
the order of their allowed pairs until a share of the forward is spent, and the mask of these rows
alone is planned on the same layout.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ringattn import methods
from ringattn.cost import price
from ringattn.errors import UserError
from ringattn.mask import Mask
from ringattn.schedule import Schedule

if TYPE_CHECKING:
    from ringattn.plan import Plan

BLOCK = 128  # rows that a kernel handles at once: ranges are cut at multiples of it
FEWEST_CHUNKS = 64  # shorter sequences are cut finer
MOST_CHUNKS = 1 << 13  # longer ones are cut coarser
TRIALS = 6  # plans priced in search of the largest set of rows


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a plan that are computed again.

    Attributes:
        ranges: int64 (n, 2), query rows [start, stop) of the whole sequence, sorted, disjoint.
        plan: of the mask restricted to these rows, on the plan's layout; None if there are none.
        share: predicted part of the attention forward that it computes again: of the time where
            the context has a cluster, else of the mask area.
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
    A set is priced where the context has a cluster; otherwise mask areas are compared. Nothing is
    cheap in a mask whose blocks are selected at run time.

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


def cheap_rows(mask: Mask, share: float) -> np.ndarray:
    """Rows with the fewest allowed pairs, as many as make up a share of the mask's area.

    Rows are looked at in chunks of 128, or less for short sequences, cut also where bands begin and
    end; the cheapest chunks come first, earlier ones on a tie.

    Args:
        mask: for blocks selected at run time, no row counts as cheap.
        share: of `mask.area`, 0 to 1.

    Returns:
        int64 (n, 2), query rows [start, stop), sorted, disjoint and not adjoining.
    """
    _check_share(share)
    if mask.routing is not None:
        return np.empty((0, 2), dtype=np.int64)
    start, stop, area, order = _cheapest_first(mask)
    return _ranges(start, stop, order[: _count_within(area[order], share)])


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"share={share}", "must be in [0, 1]", "pass e.g. 0.25")


def _count_within(area: np.ndarray, share: float) -> int:
    """How many first chunks stay within the share; the sums are exact integers."""
    return int(np.searchsorted(np.cumsum(area), int(share * int(area.sum())), side="right"))


def _cheapest_first(mask: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """start, stop and area of chunks in sequence order, and the order of their cost per row."""
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
    start, stop = cuts, np.append(cuts[1:], length)
    area = mask.row_area(start, stop)
    return start, stop, area, np.argsort(area / (stop - start), kind="stable")


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
    ranges = cheap_rows(plan.mask, share)
    spent = share
    if plan.context.cluster is not None and plan.mask.routing is None:
        ranges, spent = _largest_in_time(plan, share)
    elif len(ranges):
        area = plan.mask.row_area(ranges[:, 0], ranges[:, 1]).sum()
        spent = float(area / max(plan.mask.area, 1))
    if not len(ranges):
        return Part(ranges, None, 0.0)
    return Part(ranges, _plan_of(plan, ranges), spent)


def _largest_in_time(plan: "Plan", share: float) -> tuple[np.ndarray, float]:
    """Ranges whose restricted forward is predicted to stay within the share, and that share.

    More rows never take less time, or nearly so: halving finds how many.
    """
    cluster = plan.context.cluster
    assert cluster is not None
    kernel = plan.context.kernel if plan.context.kernel in cluster.kernels else None
    whole = price(plan.forward, cluster, kernel).seconds
    start, stop, area, order = _cheapest_first(plan.mask)
    best, spent = _ranges(start, stop, order[:0]), 0.0
    low, high = 0, len(order)
    trial = len(order) if share == 1 else _count_within(area[order], share)
    for _ in range(TRIALS):
        if not low < trial <= high:
            break
        ranges = _ranges(start, stop, order[:trial])
        part = price(_forward(plan, ranges), cluster, kernel).seconds / max(whole, 1e-30)
        if part <= share:
            best, spent, low = ranges, part, trial
        else:
            high = trial - 1
        trial = (low + high + 1) // 2
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
    made = type(plan)(plan.context, mask, plan.layout, plan.method, schedules, plan.settings)
    return made
