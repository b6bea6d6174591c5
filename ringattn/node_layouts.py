"""Layouts that balance teams of ranks, for plans that share heads inside a team."""

import heapq
from itertools import pairwise

import numpy as np

from ringattn.balance import Work, equalize, spread
from ringattn.errors import UserError
from ringattn.layout import Layout, from_ranges
from ringattn.masks import Mask

CHUNK = 8192  # tokens of a run that is placed as one, where that leaves about 8 for every team
_DENSE = 3  # a chunk of more than that part of a team's work is cut into one piece for every team
Row = tuple[int, int, int, int]


def node_balanced(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    chunk: int | None = None,
    group: int | None = None,
    max_imbalance: float = 1.0,
) -> Layout:
    """Chunks of tokens, largest mask area first, to the least loaded team with room, then exchanged
    between teams until area and the cost of keys are near equal.

    A team is a node, or `group` of its ranks. Every rank holds equally many tokens (+-1), and a
    team's tokens are cut into consecutive runs for its ranks. Balanced where the ranks of a team
    share the heads of their tokens.

    Args:
        mask: its area per chunk is what is balanced.
        world: P, whole nodes of `ranks_per_node` ranks.
        ranks_per_node: L.
        chunk: tokens per chunk; default about 8 chunks per team, at most 8192.
        group: ranks that share heads; a divisor of L, default L.
        max_imbalance: most tokens of a rank over the mean, where more tokens balance the area.
    """
    return _place(
        mask, world, ranks_per_node, "node_balanced", chunk, group, max_imbalance, whole=False
    )


def hybrid(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    chunk: int | None = None,
    group: int | None = None,
    max_imbalance: float = 1.0,
) -> Layout:
    """As `node_balanced`, with short connected parts of the mask (documents) whole on one rank.

    Parts of at most a rank's tokens and its share of the area stay whole, the largest on the least
    loaded rank of their team. Made for the method "hybrid".
    """
    return _place(mask, world, ranks_per_node, "hybrid", chunk, group, max_imbalance, whole=True)


def components(mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop of the maximal runs of tokens that no pair of the mask leaves."""
    bands = mask.bands
    low = np.minimum(bands["q0"], bands["k0"])
    high = np.maximum(bands["q1"], bands["k1"])
    order = np.argsort(low, kind="stable")
    low, reach = low[order], np.maximum.accumulate(high[order]) if len(order) else high
    fresh = np.concatenate([[True], low[1:] >= reach[:-1]])[: len(low)]
    start = low[fresh]
    stop = reach[np.concatenate([np.flatnonzero(fresh)[1:] - 1, [len(low) - 1]])[: len(start)]]
    # Tokens between parts take part in no pair; they are parts of their own.
    edges = np.unique(np.concatenate([[0], start, stop, [mask.seq_len]]))
    return edges[:-1], edges[1:]


def _place(
    mask: Mask,
    world: int,
    ranks_per_node: int,
    name: str,
    chunk: int | None,
    group: int | None,
    max_imbalance: float,
    *,
    whole: bool,
) -> Layout:
    size = group or ranks_per_node
    _check(name, world, ranks_per_node, size, chunk, max_imbalance)
    seq_len, count = mask.seq_len, world // size
    cuts = np.arange(world + 1, dtype=np.int64) * seq_len // world
    room = np.diff(cuts[::size])
    work = Work(mask)
    start, stop = components(mask)
    area = work.of(start, stop)
    short = np.zeros(len(start), dtype=bool)
    if whole:
        short = (stop - start <= seq_len // world) & (area <= work.total / world)
    longest = chunk or min(CHUNK, max(1, seq_len // (8 * count)))
    items = [(int(a), int(b), True) for a, b in zip(start[short], stop[short], strict=True)]
    for a, b in zip(start[~short].tolist(), stop[~short].tolist(), strict=True):
        items += _chunks(a, b, longest, work, count)
    teams = spread(items, work, room.tolist())
    equalize(teams, work, int((max_imbalance - 1.0) * seq_len / world) * size)
    rows: list[Row] = []
    for number, team in enumerate(teams):
        rows += deal(team.items, work, number * size, size)
    rows.sort(key=lambda row: (row[3], row[0]))
    return from_ranges(seq_len, world, rows, name)


def _check(
    name: str, world: int, node: int, size: int, chunk: int | None, max_imbalance: float
) -> None:
    if world % node:
        raise UserError(
            f"layout={name!r} over {world} ranks",
            f"needs whole nodes of {node} ranks",
            "set ranks_per_node to a divisor, or choose another layout",
        )
    if size < 1 or node % size:
        raise UserError(
            f"group={size}", f"must divide the {node} ranks of a node", "pass a divisor"
        )
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk}", "must be >= 1", "pass tokens per chunk")
    if not 1.0 <= max_imbalance <= 2.0:
        raise UserError(
            f"max_imbalance={max_imbalance}", "must be 1.0 to 2.0", "pass e.g. 1.05 for 5 % more"
        )


def _chunks(
    start: int, stop: int, longest: int, work: Work, count: int
) -> list[tuple[int, int, bool]]:
    """Runs of at most `longest` tokens; a part so dense that these are too much work for one team
    is cut into a piece of equal work for every team."""
    edges = np.append(np.arange(start, stop, longest), stop)
    heaviest = float(work.of(edges[:-1], edges[1:]).max(initial=0.0))
    if count > 1 and heaviest * _DENSE * count > work.total:
        fine = work.split(start, stop, count)
        # Long pieces of little work stay chunks.
        parts = [np.arange(a, b, longest) for a, b in pairwise(fine)]
        edges = np.append(np.concatenate(parts), stop)
    return [(int(a), int(b), False) for a, b in pairwise(edges)]


def deal(items: list[tuple[int, int, bool]], work: Work, first_rank: int, size: int) -> list[Row]:
    """A team's runs for its ranks: whole ones, largest first, to the least loaded rank with room,
    the others in order of position until each rank is full."""
    tokens = sum(stop - start for start, stop, _ in items)
    room = np.diff(np.arange(size + 1) * tokens // size).tolist()
    kept = np.array([item[:2] for item in items if item[2]], dtype=np.int64).reshape(-1, 2)
    runs = [(start, stop) for start, stop, whole in items if not whole]
    rows: list[Row] = []
    area = work.of(kept[:, 0], kept[:, 1])
    heap = [(0.0, rank) for rank in range(size)]
    for index in np.lexsort((kept[:, 0], -area)).tolist():
        (start, stop), full = kept[index].tolist(), []
        while heap and room[heap[0][1]] < stop - start:
            full.append(heapq.heappop(heap))
        if heap:
            load, rank = heapq.heappop(heap)
            room[rank] -= stop - start
            rows.append((start, stop, 1, first_rank + rank))
            heapq.heappush(heap, (load + float(area[index]), rank))
        else:
            runs.append((start, stop))
        for item in full:
            heapq.heappush(heap, item)
    return rows + _fill(sorted(runs), room, first_rank)


def _fill(runs: list[tuple[int, int]], left: list[int], first_rank: int) -> list[Row]:
    """Runs dealt to ranks until each is full."""
    rows, rank = [], 0
    for start, stop in runs:
        while start < stop:
            while left[rank] == 0:
                rank += 1
            taken = min(left[rank], stop - start)
            rows.append((start, start + taken, 1, first_rank + rank))
            left[rank] -= taken
            start += taken
    return rows
