"""Layouts that balance nodes instead of ranks, for plans that share heads inside a node."""

import heapq

import numpy as np

from ringattn.errors import UserError
from ringattn.layout import Layout, from_ranges
from ringattn.masks import Mask
from ringattn.tiles import cropped_area


def node_balanced(mask: Mask, world: int, ranks_per_node: int, chunk: int | None = None) -> Layout:
    """Chunks of tokens, largest mask area first, each to the least loaded node with room.

    Every rank holds equally many tokens (+-1); a node's tokens are cut into consecutive runs for
    its ranks. Balanced where the ranks of a node share the heads of their tokens.

    Args:
        mask: its area per chunk is what is balanced.
        world: P, whole nodes of `ranks_per_node` ranks.
        ranks_per_node: L.
        chunk: tokens per chunk; default about 8 chunks per node, at most 8192.
    """
    return _place(mask, world, ranks_per_node, chunk, "node_balanced", keep_short=False)


def hybrid(mask: Mask, world: int, ranks_per_node: int, chunk: int | None = None) -> Layout:
    """Short connected parts of the mask (documents) stay whole on one rank; the rest fills up.

    Short parts go to the least loaded rank with room, largest first; the others are placed as
    by `node_balanced` into the room that is left. Made for the method "hybrid".
    """
    return _place(mask, world, ranks_per_node, chunk, "hybrid", keep_short=True)


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
    mask: Mask, world: int, ranks_per_node: int, chunk: int | None, name: str, *, keep_short: bool
) -> Layout:
    if world % ranks_per_node:
        raise UserError(
            f"layout={name!r} over {world} ranks",
            f"needs whole nodes of {ranks_per_node} ranks",
            "set ranks_per_node to a divisor, or choose another layout",
        )
    nodes, seq_len = world // ranks_per_node, mask.seq_len
    room = np.diff(np.arange(world + 1, dtype=np.int64) * seq_len // world)
    start, stop = components(mask)
    area = cropped_area(mask.bands, start, stop)
    load = np.zeros(world, dtype=np.int64)
    rows: list[tuple[int, int, int, int]] = []
    split = np.ones(len(start), dtype=bool)
    if keep_short:
        fits = (stop - start <= room.min()) & (area <= area.sum() / world)
        split = _whole(start, stop, area, fits, room, load, rows)
    size = chunk or min(8192, max(1, seq_len // (8 * nodes)))
    pieces = _chunks(mask, start[split], stop[split], size)
    node_room = room.reshape(nodes, ranks_per_node).sum(axis=1)
    node_load = load.reshape(nodes, ranks_per_node).sum(axis=1)
    for node, runs in enumerate(_to_nodes(pieces, node_room, node_load)):
        first = node * ranks_per_node
        rows += _fill(sorted(runs), room[first : first + ranks_per_node], first)
    rows.sort(key=lambda row: (row[3], row[0]))
    return from_ranges(seq_len, world, rows, name)


def _whole(
    start: np.ndarray,
    stop: np.ndarray,
    area: np.ndarray,
    fits: np.ndarray,
    room: np.ndarray,
    load: np.ndarray,
    rows: list[tuple[int, int, int, int]],
) -> np.ndarray:
    """Places parts whole, largest area first; returns which parts are left to be split."""
    left = np.ones(len(start), dtype=bool)
    heap = [(0, rank) for rank in range(len(room))]
    candidates = np.flatnonzero(fits)
    for index in candidates[np.argsort(-area[candidates], kind="stable")]:
        length, full = int(stop[index] - start[index]), []
        while heap and room[heap[0][1]] < length:
            full.append(heapq.heappop(heap))
        if heap:
            _, rank = heapq.heappop(heap)
            room[rank] -= length
            load[rank] += int(area[index])
            rows.append((int(start[index]), int(stop[index]), 1, rank))
            left[index] = False
            heapq.heappush(heap, (int(load[rank]), rank))
        for item in full:
            heapq.heappush(heap, item)
    return left


def _chunks(
    mask: Mask, start: np.ndarray, stop: np.ndarray, size: int
) -> list[tuple[int, int, int]]:
    """(area, start, stop) of chunks of at most `size` tokens, largest area first."""
    cuts = [
        (a, min(a + size, int(last)))
        for first, last in zip(start, stop, strict=True)
        for a in range(int(first), int(last), size)
    ]
    if not cuts:
        return []
    low, high = np.array(cuts, dtype=np.int64).T
    area = cropped_area(mask.bands, low, high)
    order = np.argsort(-area, kind="stable")
    return [(int(area[i]), int(low[i]), int(high[i])) for i in order]


def _to_nodes(
    chunks: list[tuple[int, int, int]], room: np.ndarray, load: np.ndarray
) -> list[list[tuple[int, int]]]:
    """Runs of each node: every chunk to the least loaded node with room, cut where it is full."""
    heap = [(int(load[node]), node) for node in range(len(room)) if room[node] > 0]
    heapq.heapify(heap)
    runs: list[list[tuple[int, int]]] = [[] for _ in room]
    for area, start, stop in chunks:
        while start < stop:
            weight, node = heapq.heappop(heap)
            taken = int(min(room[node], stop - start))
            runs[node].append((start, start + taken))
            room[node] -= taken
            share = area * taken // max(stop - start, 1)
            area, start = area - share, start + taken
            if room[node] > 0:
                heapq.heappush(heap, (weight + share, node))
    return runs


def _fill(
    runs: list[tuple[int, int]], room: np.ndarray, first_rank: int
) -> list[tuple[int, int, int, int]]:
    """A node's runs in order of position, dealt to its ranks until each is full."""
    rows, rank = [], 0
    left = [int(n) for n in room]
    for start, stop in runs:
        while start < stop:
            while left[rank] == 0:
                rank += 1
            taken = min(left[rank], stop - start)
            rows.append((start, start + taken, 1, first_rank + rank))
            left[rank] -= taken
            start += taken
    return rows
