"""Kernel time of a schedule: what each rank computes in each step.

Time is linear in a curve's figures. `load_of` counts what a kernel of given blocks has to do, and
`step_seconds` weighs the counts.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import ceil_div
from ringattn.cost.cluster import Cluster, Curve
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.schedule import Direction, Schedule, Shapes, bands_of

_SLOTS = 1 << 10  # more than any slot number
_OPEN = np.int64(1 << 40)


@dataclass(frozen=True, eq=False, kw_only=True)
class Load:
    """What kernels have to do, by (step, rank); float64.

    Attributes:
        pairs: FLOPs of the pairs in blocks that are touched, over all heads.
        rows, keys: FLOPs of one pair for each block row and each key, over all heads.
        tiles, launches: how many.
        longest: FLOPs of the longest block of each launch.
        merged: elements of results that a launch adds to existing ones.
        masks: elements of masks. matrix: FLOPs of the pairs in block matrices, over all heads.
        products: of block matrices. These three are counted with `Curve.cut` only.
    """

    pairs: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    tiles: np.ndarray
    launches: np.ndarray
    longest: np.ndarray
    merged: np.ndarray
    masks: np.ndarray
    matrix: np.ndarray
    products: np.ndarray


def pair_flops(shapes: Shapes, direction: Direction) -> float:
    """FLOPs of one (query, key) pair and head: 2 products forward, 5 backward (recomputing)."""
    qk, v = shapes.qk_dim, shapes.v_dim
    return 2.0 * (qk + v) if direction == "forward" else 2.0 * (3 * qk + 2 * v)


def flops_per_pair(schedule: Schedule) -> float:
    """FLOPs of one pair and head of a schedule."""
    return pair_flops(schedule.shapes, schedule.direction)


def step_seconds(load: Load, curve: Curve, cluster: Cluster) -> np.ndarray:
    """Kernel seconds of each step and rank, launches and their merges included; (steps, P)."""
    flops = load.pairs + curve.row_pairs * load.rows + curve.key_pairs * load.keys
    flops = flops + curve.tail * cluster.cores * load.longest
    fixed = 1e-6 * (curve.tile_us * load.tiles + curve.launch_us * load.launches)
    merges = curve.result_bytes * load.merged / (1e9 * cluster.memory_gbs)
    seconds = flops / (1e12 * curve.tflops) + fixed + merges
    if curve.cut:
        seconds = seconds + 1e-9 * curve.mask_ns * load.masks
        seconds = seconds + load.matrix / (1e12 * (curve.matrix_tflops or curve.tflops))
        seconds = seconds + 1e-6 * curve.matrix_us * load.products
    return seconds


def least_backward(forward: Schedule, backward: Curve) -> float:
    """Seconds that the busiest rank computes at least in the backward of a plan, from its forward:
    the same tiles, without what launches cost."""
    tasks, curve = forward.tasks, backward
    bands = bands_of(tasks)
    if curve.cut:  # calls hold at least the allowed pairs
        pairs = tasks["area"].astype(np.float64)
    else:
        computed = computed_pairs(tasks, forward.matrices, curve.block_rows, curve.block_keys)
        pairs = computed.astype(np.float64)
        pairs += curve.row_pairs * _up(_span(bands, "q"), curve.block_rows)
        pairs += curve.key_pairs * _up(_span(bands, "k"), curve.block_keys)
    pairs *= (tasks["h1"] - tasks["h0"]) * pair_flops(forward.shapes, "backward")
    return float(np.bincount(tasks["rank"], pairs).max(initial=0.0)) / (1e12 * curve.tflops)


def rounded_area(bands: np.ndarray, block_rows: int, block_keys: int) -> np.ndarray:
    """Pairs that a kernel computes for each tile, blocks cut by an edge counted whole.

    Row and key counts are rounded up to blocks. A diagonal edge runs through blocks and wastes half
    of each on average, so that it is moved outwards by half a block.
    """
    step = bands["step"]
    padded = bands.copy()
    rows, keys = _span(bands, "q"), _span(bands, "k")
    padded["q1"] = bands["q0"] + _up(rows, block_rows) * step
    padded["k1"] = bands["k0"] + _up(keys, block_keys) * step
    half = (block_rows + block_keys) // 4 * step
    # An edge that leaves the tile uncut stays open however the tile is rounded.
    open_low = bands["lo"] <= bands["k0"] - (bands["q1"] - 1)
    open_high = bands["hi"] >= bands["k1"] - 1 - bands["q0"]
    padded["lo"] = np.where(open_low, -_OPEN, bands["lo"] - half)
    padded["hi"] = np.where(open_high, _OPEN, bands["hi"] + half)
    return band_ops.area(padded)


def computed_pairs(
    tasks: np.ndarray, matrices: tuple[BlockMatrix, ...], block_rows: int, block_keys: int
) -> np.ndarray:
    """Pairs that a kernel computes for each task; allowed blocks of a matrix are counted whole."""
    pairs = rounded_area(bands_of(tasks), block_rows, block_keys)
    for number, matrix in enumerate(matrices):
        q_size, k_size = (float(np.diff(e).mean()) for e in (matrix.q_edges, matrix.k_edges))
        waste = (
            _up(np.ceil(q_size), block_rows) / q_size * _up(np.ceil(k_size), block_keys) / k_size
        )
        mine = tasks["matrix"] == number
        pairs[mine] = np.minimum(pairs[mine], tasks["area"][mine] * waste)
    return pairs


def partial_share(schedule: Schedule, block_rows: int, block_keys: int) -> float:
    """Share of the computed pairs that lie in tiles of which the mask allows only some pairs."""
    tasks = schedule.tasks
    bands = bands_of(tasks)
    pairs = computed_pairs(tasks, schedule.matrices, block_rows, block_keys).astype(np.float64)
    pairs *= tasks["h1"] - tasks["h0"]
    partial = tasks["area"] < _span(bands, "q") * _span(bands, "k")
    return float(pairs[partial].sum() / max(pairs.sum(), 1.0))


def load_of(schedule: Schedule, block_rows: int, block_keys: int) -> Load:
    """Counts the work of a schedule for a kernel with these blocks."""
    tasks = schedule.tasks
    shape = (max(schedule.nsteps, 1), schedule.world)
    if not len(tasks):
        return Load(**{entry.name: np.zeros(shape) for entry in fields(Load)})
    bands = bands_of(tasks)
    heads = (tasks["h1"] - tasks["h0"]) * flops_per_pair(schedule)
    flat = tasks["step"] * schedule.world + tasks["rank"]
    order, first = launches_of(tasks, flat)
    where = flat[order[first]]

    def table(index: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(index, weights, shape[0] * shape[1]).reshape(shape).astype(np.float64)

    block = block_rows if schedule.direction == "forward" else block_keys
    longest = _longest_block(schedule, block) * flops_per_pair(schedule)
    return Load(
        pairs=table(flat, computed_pairs(tasks, schedule.matrices, block_rows, block_keys) * heads),
        rows=table(flat, _up(_span(bands, "q"), block_rows) * heads),
        keys=table(flat, _up(_span(bands, "k"), block_keys) * heads),
        tiles=table(flat, None),
        launches=table(where, None),
        longest=table(where, np.maximum.reduceat(longest[order], first)),
        merged=table(where, merged_elements(schedule, tasks[order], first)),
        **{name: np.zeros(shape) for name in ("masks", "matrix", "products")},
    )


def _span(bands: np.ndarray, axis: str) -> np.ndarray:
    return ceil_div(bands[axis + "1"] - bands[axis + "0"], bands["step"])


def _up(count: np.ndarray, block: int) -> np.ndarray:
    return ceil_div(count, block) * block


def launches_of(tasks: np.ndarray, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tasks ordered by launch, and each launch's first: one launch per tuple of operand slots."""
    key = flat
    for name in ("qslot", "kslot", "oslot", "gslot"):
        key = key * _SLOTS + tasks[name]
    order = np.argsort(key, kind="stable")
    return order, np.flatnonzero(np.concatenate([[True], np.diff(key[order]) != 0]))


def _longest_block(schedule: Schedule, block: int) -> np.ndarray:
    """Pairs of each tile's longest block: of query rows forward, of keys backward."""
    tasks = schedule.tasks
    axis = "k" if schedule.direction == "forward" else "q"
    # At most hi - lo + 1 keys per row, and as many rows per key.
    width = np.minimum(tasks[axis + "1"] - tasks[axis + "0"], tasks["hi"] - tasks["lo"] + block)
    longest = block * ceil_div(width, tasks["stride"])
    # Blocks that a matrix leaves out shorten each row about alike.
    share = tasks["area"] / np.maximum(band_ops.area(bands_of(tasks)), 1)
    return np.where(tasks["matrix"] < 0, longest, longest * np.minimum(share, 1))


def merged_elements(schedule: Schedule, tasks: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Elements that each launch adds to results of earlier launches; tasks ordered by launch.

    Heads that launches do not share are counted apart.
    """
    shapes = schedule.shapes
    edges = np.unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    launch = np.repeat(np.arange(len(first)), np.diff(first, append=len(tasks)))
    total = np.zeros(len(first))
    for low, high in pairwise(edges.tolist()):
        held = (tasks["h0"] <= low) & (high <= tasks["h1"])
        part = tasks[held]
        which, begin = np.unique(launch[held], return_index=True)
        if not len(which):
            continue
        rows = _added_rows(part, begin, "oslot", "q") * (high - low)
        if schedule.direction == "forward":
            total[which] += rows * shapes.v_dim
            continue
        keys = _added_rows(part, begin, "gslot", "k")
        keys = keys * (high - low) * shapes.kv_heads / shapes.q_heads
        total[which] += rows * shapes.qk_dim + keys * (shapes.qk_dim + shapes.v_dim)
    return total


def _added_rows(tasks: np.ndarray, first: np.ndarray, slot: str, axis: str) -> np.ndarray:
    """Result rows of each launch that lie in the hull of what earlier launches wrote to the slot.

    Rows that nobody wrote before are written, not added.
    """
    low = np.minimum.reduceat(tasks[axis + "0"], first)
    high = np.maximum.reduceat(tasks[axis + "1"], first)
    rows = np.add.reduceat(tasks[axis + "1"] - tasks[axis + "0"], first)
    where = tasks["rank"][first] * _SLOTS + tasks[slot][first]
    # Launches are sorted by step; a stable sort keeps those of a slot in the order of time.
    order = np.argsort(where, kind="stable")
    where, low, high, rows = (x[order] for x in (where, low, high, rows))
    fresh = np.concatenate([[True], where[1:] != where[:-1]])
    above = np.cumsum(fresh) * _OPEN
    written_high = np.maximum.accumulate(above + high) - above
    written_low = above - np.maximum.accumulate(above - low)
    before_high = np.where(fresh, 0, np.concatenate([[0], written_high[:-1]]))
    before_low = np.where(fresh, 0, np.concatenate([[0], written_low[:-1]]))
    shared = np.minimum(high, before_high) - np.maximum(low, before_low)
    added = np.empty_like(rows)
    added[order] = np.clip(shared, 0, rows)
    return added
