"""Memory that a schedule needs beyond the shards, for all ranks at once."""

import numpy as np

from ringattn.schedule import ACCUMULATORS, Channel, Schedule, Wire


def peak_bytes(schedule: Schedule) -> np.ndarray:
    """`schedule.peak_bytes` of every rank: slots beyond home and messages in flight; int64 (P,)."""
    shapes, world = schedule.shapes, schedule.world
    wires = [Wire.ACCUMULATOR if c in ACCUMULATORS else Wire.INPUT for c in Channel]
    rows = zip(Channel, wires, strict=True)
    size = np.array([shapes.row_bytes(c, schedule.direction, wire) for c, wire in rows])
    slots = schedule.slots[schedule.slots["slot"] > 0]
    total = np.zeros(world, dtype=np.int64)
    np.add.at(total, slots["rank"], slots["rows"] * slots["heads"] * size[slots["channel"]])
    flight = np.zeros((schedule.nsteps + 2, world), dtype=np.int64)
    moves, nbytes = schedule.moves, schedule.move_bytes
    for rank in ("src", "dst"):
        # A local copy has no bytes, so that no message is counted twice on a rank.
        np.add.at(flight, (moves["post"], moves[rank]), nbytes)
        np.add.at(flight, (moves["land"] + 1, moves[rank]), -nbytes)
    return total + np.cumsum(flight, axis=0).max(axis=0)
