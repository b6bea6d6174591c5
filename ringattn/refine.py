"""Refining a layout: exchanges between teams of ranks that make the planned time fall.

A local search from a layout that balances work. Each try exchanges runs of equal length between a
team that is predicted to compute long and one that is done early, plans and prices the result, and
keeps it only where the predicted time is less. Pure host work; all ranks search alike.
"""

from collections.abc import Callable, Iterator

import numpy as np

from ringattn.balance import Team, Work, exchange
from ringattn.layout import Layout, from_ranges
from ringattn.masks import Mask
from ringattn.node_layouts import components, deal

# Parts of the difference between two teams that an exchange may shift.
_SHARES = (0.5, 0.25, 0.12)
_WIDTH = 3  # teams at either end that are tried


def refine(
    mask: Mask,
    layout: Layout,
    size: int,
    price: Callable[[Layout], tuple[float, np.ndarray]],
    tries: int,
) -> Layout:
    """The layout after at most `tries` plans; the given one where nothing helps.

    Args:
        mask: what is attended. layout: where to start; of step 1.
        size: ranks that share heads, a divisor of P. Every rank keeps its number of tokens (+-1).
        price: of a layout, the predicted seconds and each rank's seconds of compute, (P,).
        tries: plans that may be priced, the start not counted.
    """
    if (layout.ranges["step"] > 1).any() or layout.world <= size:
        return layout
    work = Work(mask)
    teams = _teams(mask, layout, size)
    seconds, compute = price(layout)
    proposals = _proposals(compute, size)
    for _ in range(tries):
        step = next(proposals, None)
        if step is None:
            break
        changed = _tried(teams, work, *step)
        if changed is None:
            continue
        other = _built(changed, work, layout, size)
        found, loads = price(other)
        if found < seconds:
            teams, layout, seconds = changed, other, found
            proposals = _proposals(loads, size)
    return layout


def _teams(mask: Mask, layout: Layout, size: int) -> list[Team]:
    """What each team holds; connected parts of the mask that are whole on a rank stay whole."""
    start, stop = components(mask)
    teams = [Team(0) for _ in range(layout.world // size)]
    for first, last, _, _, owner, _ in layout.ranges.tolist():
        # A range may hold several parts, the outer ones cut off.
        low = int(np.searchsorted(stop, first, side="right"))
        high = int(np.searchsorted(start, last, side="left"))
        for part in range(low, high):
            a, b = max(first, int(start[part])), min(last, int(stop[part]))
            whole = size > 1 and a == start[part] and b == stop[part]
            teams[owner // size].items.append((a, b, bool(whole)))
    return teams


def _proposals(compute: np.ndarray, size: int) -> Iterator[tuple[int, int, float]]:
    """(team with much, team with little, part of all work to shift), the most promising first."""
    load = compute.reshape(-1, size).max(axis=1)
    order = np.argsort(load, kind="stable")
    width = min(_WIDTH, len(order) // 2)
    total = float(load.sum())
    for share in _SHARES:
        for i in range(width):
            for j in range(width):
                high, low = int(order[-1 - i]), int(order[j])
                if load[high] > load[low]:
                    yield high, low, share * float(load[high] - load[low]) / total


def _tried(teams: list[Team], work: Work, high: int, low: int, part: float) -> list[Team] | None:
    """The teams after an exchange between two of them; None where there is none."""
    changed = list(teams)
    for index in (high, low):
        changed[index] = Team(0, 0.0, list(teams[index].items))
    if part <= 0 or not exchange(changed[high], changed[low], work, part * work.total):
        return None
    return changed


def _built(teams: list[Team], work: Work, layout: Layout, size: int) -> Layout:
    rows = [
        row
        for number, team in enumerate(teams)
        for row in deal(sorted(team.items), work, number * size, size)
    ]
    rows.sort(key=lambda row: (row[3], row[0]))
    return from_ranges(layout.seq_len, layout.world, rows, "refined")
