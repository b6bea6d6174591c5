"""What ranks on CPU cores do beside kernels: runs, steps, messages, copies."""

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cluster import OnCores
from ringattn.schedule import ACCUMULATORS, Op, Schedule, Wire


@dataclass(frozen=True, eq=False, kw_only=True)
class HostWork:
    """Counts by (step, rank), float64, as the executor does it.

    Attributes:
        made: bytes of accumulators that a direction makes and of what it keeps, by rank, (P,).
        posted: messages that a rank posts in a step, sends and receives.
        packed_parts, packed: runs of rows and heads that are copied into messages, and their bytes.
        landed_parts, written, added: runs that land, and their bytes by what is done with them.
    """

    made: np.ndarray
    posted: np.ndarray
    packed_parts: np.ndarray
    packed: np.ndarray
    landed_parts: np.ndarray
    written: np.ndarray
    added: np.ndarray


def host_work(schedule: Schedule) -> HostWork:
    """Counts the work of a schedule. Every move is packed by its source, all runs alike."""
    moves, world = schedule.moves, schedule.world
    shape = (max(schedule.nsteps, 1), world)

    def table(step: np.ndarray, rank: np.ndarray, weights: np.ndarray) -> np.ndarray:
        flat = np.bincount(step * world + rank, weights, shape[0] * world)
        return flat.reshape(shape)

    sizes = schedule.payload_bytes.astype(np.float64)
    adds, ones = moves["op"] == Op.ADD, np.ones(len(moves))
    far = moves[moves["src"] != moves["dst"]]
    ends = np.unique(
        np.stack([far[name] for name in ("post", "land", "lane", "src", "dst")]), axis=1
    )
    post, _, _, src, dst = ends
    each = np.ones(len(post))
    return HostWork(
        made=_made(schedule),
        posted=table(post, src, each) + table(post, dst, each),
        packed_parts=table(moves["post"], moves["src"], ones),
        packed=table(moves["post"], moves["src"], sizes),
        landed_parts=table(moves["land"], moves["dst"], ones),
        written=table(moves["land"], moves["dst"], np.where(adds, 0, sizes)),
        added=table(moves["land"], moves["dst"], np.where(adds, sizes, 0)),
    )


def _made(schedule: Schedule) -> np.ndarray:
    """Home accumulators, those of further slots, what a backward reads for delta, what is kept."""
    shapes, rows = schedule.shapes, schedule.home_rows.astype(np.float64)
    wide, item = shapes.accumulator_itemsize, shapes.itemsize
    q, v = shapes.q_heads * shapes.qk_dim, shapes.q_heads * shapes.v_dim
    if schedule.direction == "forward":
        made = rows * v * wide
        made += [schedule.saved_bytes(rank) for rank in range(schedule.world)]
    else:
        keys = shapes.kv_heads * (shapes.qk_dim + shapes.v_dim)
        made = rows * ((q + keys) * wide + 2 * v * item)
    for slot in schedule.slots:
        if slot["slot"] > 0 and slot["channel"] in ACCUMULATORS:
            row = shapes.row_bytes(int(slot["channel"]), schedule.direction, Wire.ACCUMULATOR)
            made[slot["rank"]] += slot["rows"] * slot["heads"] * row
    return made


def host_seconds(work: HostWork, costs: OnCores) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a rank's own thread before each step's kernels and after them, (steps, P) each."""
    before = 1e-6 * (costs.step_us + costs.message_us * work.posted)
    before = (
        before + 1e-6 * costs.part_us * work.packed_parts + work.packed / (1e9 * costs.copy_gbs)
    )
    before[0] += 1e-6 * costs.run_us + work.made / (1e9 * costs.run_gbs)
    after = 1e-6 * costs.part_us * work.landed_parts + work.written / (1e9 * costs.copy_gbs)
    return before, after + work.added / (1e9 * costs.add_gbs)
