"""Published methods as plans: which generator, layout and traffic stands for which system.

A published method is imitated by the plan generator that it corresponds to, on the layout that it
used, with the parts of its implementation that a plan can say:

    ulysses             contiguous, u = P; the backward starts from saved head-layout q, k, v
    usp, loongtrain     u = 8 inside a node, inner ring (windows of 2 for loongtrain) on zigzag per
                        document over the P / 8 groups; tokens of a group are cut contiguously
    ring, megatron-ring zigzag per document
    allgather           zigzag per document; computes when everything has arrived, rows cross to a
                        node once; the gathered keys are reordered in `GATHER_PASSES` copies
    hybrid-cp           each document zigzag over the power of two of ranks that its work asks for
    magi-*              area_greedy in chunks of 2048, direct in two stages; magi-native sends
                        rows that several ranks of a node need only once between nodes; magi-a2av
                        packs and unpacks around its all-to-all in `EXCHANGE_PASSES` copies
    burst-*             ring or double ring forward; flat rings circulate the query side backward
    kernel-*            one rank

Gradients and partial results travel in the input dtype. A document is cut into 2P near-equal chunks
where the published code pads it to a multiple of 2P.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ringattn import layouts
from ringattn.benchmarks.calibration_rows import Row
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.methods import all_gather, burst, direct, double_ring, heads, ring
from ringattn.methods.common import Problem
from ringattn.schedule import MOVE, Channel, Direction, Lane, Op, Schedule, Shapes, Wire

MAGI_CHUNK, MAGI_STAGES, NODE = 2048, 2, 8
# Passes over all gathered keys, values and their gradients that reorder, clear and add them.
GATHER_PASSES = {"forward": 1, "backward": 16}
EXCHANGE_PASSES = 3  # over rows that an all-to-all of unequal parts brings, to pack and unpack them
_ROW = 1 << 40  # more than any row number


def schedules_of(row: Row, mask: Mask, node: int = NODE) -> list[Schedule]:
    """The schedules that imitate a row's method under one mask, one per direction.

    `node` consecutive ranks of the group share a node.
    """
    shapes = Shapes(
        q_heads=row.heads[0], kv_heads=row.heads[1], qk_dim=row.head_dim, v_dim=row.head_dim,
        itemsize=2, accumulator_itemsize=4,
    )  # fmt: skip
    world, method = row.gpus, row.method
    layout = _layout(row, mask, node)
    problem = Problem(
        mask=mask, layout=layout, shapes=shapes, ranks_per_node=min(node, world), wire=Wire.INPUT
    )
    return [_imitate(problem, direction, method) for direction in row.directions]


def _layout(row: Row, mask: Mask, node: int) -> Layout:
    world, method = row.gpus, row.method
    if world == 1 or method in ("ulysses", "ring-unbalanced", "llama3-allgather"):
        return layouts.contiguous(mask.seq_len, world)
    if method.startswith("magi"):
        return layouts.area_greedy(mask, world, chunk=MAGI_CHUNK)
    if method.startswith(("usp", "loongtrain")):
        return grouped_zigzag(mask, world, min(node, world), "ringfirst" not in method)
    if method == "hybrid-cp":
        return hybrid_layout(mask, world)
    if "stripe" in method:
        return layouts.striped(mask.seq_len, world)
    return document_zigzag(mask, world)


def document_ends(mask: Mask) -> np.ndarray:
    """Cut points of a mask's documents, (documents + 1,); one document for other masks."""
    if not mask.name.startswith("documents"):
        return np.array([0, mask.seq_len])
    return np.unique(np.concatenate([mask.bands["q0"], mask.bands["q1"]]))


def _zigzag_rows(
    start: np.ndarray, stop: np.ndarray, first: np.ndarray, ranks: np.ndarray
) -> np.ndarray:
    """Ranges of documents, each cut into 2R chunks over ranks first, ..., first + R - 1."""
    parts = []
    for count in np.unique(ranks):
        pick = ranks == count
        chunk = np.arange(2 * count + 1)
        cuts = start[pick, None] + (stop - start)[pick, None] * chunk // (2 * count)
        owner = np.minimum(chunk[:-1], 2 * count - 1 - chunk[:-1]) + first[pick, None]
        low, high = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
        parts.append(np.stack([low, high, np.ones_like(low), owner.ravel()], axis=1))
    rows = np.concatenate(parts)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def document_zigzag(mask: Mask, world: int) -> Layout:
    """Zigzag inside every document, as ring implementations for packed sequences do."""
    ends = document_ends(mask)
    every = np.full(len(ends) - 1, world)
    rows = _zigzag_rows(ends[:-1], ends[1:], np.zeros_like(every), every)
    return layouts.from_ranges(mask.seq_len, world, rows, "document_zigzag")


def grouped_zigzag(mask: Mask, world: int, degree: int, heads_first: bool = True) -> Layout:
    """Zigzag per document over P / U groups; a group's tokens are cut contiguously over U ranks."""
    groups = world // degree
    coarse = document_zigzag(mask, groups).ranges
    rows = []
    for group in range(groups):
        mine = coarse[coarse["owner"] == group]
        mine = mine[np.argsort(mine["start"])]
        size = mine["stop"] - mine["start"]
        ends = np.cumsum(size)
        cuts = np.arange(degree + 1) * int(ends[-1]) // degree
        edges = np.unique(np.concatenate([ends - size, ends, cuts]))
        piece = np.searchsorted(ends, edges[:-1], side="right")
        start = mine["start"][piece] + edges[:-1] - (ends - size)[piece]
        member = np.searchsorted(cuts, edges[:-1], side="right") - 1
        rank = group * degree + member if heads_first else member * groups + group
        rows.append(np.stack([start, start + np.diff(edges), np.ones_like(start), rank], axis=1))
    return layouts.from_ranges(mask.seq_len, world, np.concatenate(rows), "grouped_zigzag")


def hybrid_layout(mask: Mask, world: int) -> Layout:
    """Each document over a power of two of ranks by its length, largest first, least loaded."""
    ends = document_ends(mask)
    size = np.diff(ends)
    work = size.astype(np.float64) ** 2
    wanted = np.maximum(size / (mask.seq_len / world), work / (work.sum() / world))
    ranks = np.minimum(1 << np.ceil(np.log2(np.maximum(wanted, 1))).astype(int), world)
    load = np.zeros(world)
    first = np.zeros(len(size), dtype=np.int64)
    for index in np.lexsort((-size, -ranks)):
        count = ranks[index]
        busiest = load.reshape(-1, count).max(axis=1)
        first[index] = int(np.argmin(busiest)) * count
        load[first[index] : first[index] + count] += work[index] / count
    rows = _zigzag_rows(ends[:-1], ends[1:], first, ranks)
    return layouts.from_ranges(mask.seq_len, world, rows, "hybrid_cp")


def _imitate(problem: Problem, direction: Direction, method: str) -> Schedule:
    name = method.split("-")[0]
    forward = direction == "forward"
    inner = ring.forward if forward else ring.backward
    node = problem.ranks_per_node
    if problem.world == 1:
        return inner(problem)
    if name == "ulysses":
        degree = problem.world
        return saved_heads(heads.compose(problem, direction, "ulysses", inner, degree))
    if name in ("usp", "loongtrain"):
        if name == "loongtrain":
            inner = _windowed(double_ring.forward if forward else double_ring.backward)
        first = "ringfirst" not in method
        return saved_heads(heads.compose(problem, direction, name, inner, node, heads_first=first))
    if "allgather" in name or "allgather" in method:
        schedule = all_gather.forward(problem) if forward else all_gather.backward(problem)
        schedule = waiting(whole_shards(schedule))
        return reordered(once_per_node(schedule, node), GATHER_PASSES[direction])
    if name == "magi":
        problem = replace(problem, options={"stages": MAGI_STAGES})
        schedule = direct.forward(problem) if forward else direct.backward(problem)
        if method == "magi-native":
            return once_per_node(schedule, node)
        return repacked(schedule, EXCHANGE_PASSES)
    if name == "burst":
        if "double" in method:
            return double_ring.forward(problem) if forward else double_ring.backward(problem)
        return burst.forward(problem) if forward else burst.backward(problem)
    return inner(problem)


def _windowed(method: Callable[[Problem], Schedule]) -> Callable[[Problem], Schedule]:
    """A double ring whose windows hold two groups: LoongTrain's largest window count <= sqrt."""

    def run(problem: Problem) -> Schedule:
        local = 2 if problem.world % 4 == 0 else 1
        return method(replace(problem, ranks_per_node=local))

    return run


def saved_heads(schedule: Schedule) -> Schedule:
    """The backward of a head-parallel plan that kept q, k, v and out of the forward.

    Only dO travels to the head layout: keys and values stay, and half of the query side does.
    """
    if schedule.direction == "forward":
        return schedule
    moves = schedule.moves.copy()
    spread = (moves["sslot"] == 0) & (moves["post"] == 0)
    queries = spread & (moves["channel"] == Channel.Q)
    moves["rows"][queries] = (moves["rows"][queries] + 1) // 2
    return replace(schedule, moves=moves[~(spread & (moves["channel"] == Channel.K))])


def whole_shards(schedule: Schedule) -> Schedule:
    """Runs between the same two ranks join: a collective sends a shard as it lies."""
    moves = schedule.moves
    key = moves["src"] * schedule.world + moves["dst"]
    for name in ("channel", "post", "land"):
        key = key * (schedule.nsteps + 8) + moves[name]
    _, index, inverse = np.unique(key, return_index=True, return_inverse=True)
    joined = moves[index]
    joined["rows"] = np.bincount(inverse, moves["rows"])
    joined["s0"] = joined["d0"] = 0
    return replace(schedule, moves=joined)


def waiting(schedule: Schedule) -> Schedule:
    """A gather without overlap: the work of step 0 waits for what arrives."""
    tasks = schedule.tasks.copy()
    tasks["step"] = 1
    return replace(schedule, tasks=tasks[np.lexsort((tasks["kslot"], tasks["rank"]))])


def reordered(schedule: Schedule, passes: int) -> Schedule:
    """Every rank copies all gathered rows `passes` times before it computes."""
    extra = np.zeros(schedule.world, dtype=MOVE)
    extra["src"] = extra["dst"] = np.arange(schedule.world)
    extra["channel"] = Channel.K
    extra["rows"] = passes * int(schedule.home_rows.sum())
    extra["nheads"] = schedule.shapes.kv_heads
    return replace(schedule, moves=np.concatenate([schedule.moves, extra]))


def repacked(schedule: Schedule, passes: int) -> Schedule:
    """Every rank copies all rows that others send it `passes` times."""
    moves = schedule.moves
    came = moves[moves["src"] != moves["dst"]].copy()
    if not len(came):
        return schedule
    came["src"] = came["dst"]
    came["rows"] *= passes
    came["lane"] = Lane.INTRA
    came["op"] = Op.SET
    return replace(schedule, moves=np.concatenate([moves, came]))


def once_per_node(schedule: Schedule, node: int) -> Schedule:
    """Rows between nodes travel once per node, and on inside it, in both directions of a plan.

    Per (post, channel, owner, other node) the share of distinct rows stays on the lane between
    nodes, spread over the receivers; the rest goes over the lane inside.
    """
    far = schedule.moves["lane"] == Lane.INTER
    part = schedule.moves[far]
    if not len(part):
        return schedule
    out = part["channel"] == Channel.K
    owner = np.where(out, part["src"], part["dst"])
    key = owner * schedule.world + np.where(out, part["dst"], part["src"]) // node
    for name in ("channel", "post"):
        key = key * (schedule.nsteps + 8) + part[name]
    _, group = np.unique(key, return_inverse=True)
    first = np.where(out, part["s0"], part["d0"])
    share = (_distinct(group, first, part["rows"]) / np.bincount(group, part["rows"]))[group]
    near = part.copy()
    part["rows"] = np.ceil(part["rows"] * share).astype(np.int64)
    near["rows"] -= part["rows"]
    near["lane"] = Lane.INTRA
    table = np.concatenate([schedule.moves[~far], part, near[near["rows"] > 0]])
    return replace(schedule, moves=table)


def _distinct(group: np.ndarray, first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows in the union of the runs of each group."""
    order = np.lexsort((first, group))
    low = (group * _ROW + first)[order]
    high = low + rows[order]
    reach = np.concatenate([[0], np.maximum.accumulate(high)[:-1]])
    return np.bincount(group[order], np.maximum(high - np.maximum(low, reach), 0))
