"""What a schedule asks for, counted once: independent of how fast a cluster is."""

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cut_load import cut_load
from ringattn.cost.host_work import HostWork, host_work
from ringattn.cost.kernel_time import Load, flops_per_pair, load_of
from ringattn.cost.messages import Messages, copied_bytes, messages_of
from ringattn.schedule import Direction, Lane, Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Survey:
    """Counts of a schedule for a kernel with given blocks.

    Attributes:
        direction, world, nsteps: of the schedule.
        load: kernel work by (step, rank). messages: what travels.
        pack, unpack: memory traffic before posts and at landings, bytes, (steps, P).
        received: bytes that each rank receives, int64 (lanes, P).
        area: mask area over all tasks. flops: exact FLOPs of all ranks, masked pairs not counted.
        host: what ranks on CPU cores do beside kernels; None where it was not asked for.
    """

    direction: Direction
    world: int
    nsteps: int
    load: Load
    messages: Messages
    pack: np.ndarray
    unpack: np.ndarray
    received: np.ndarray
    area: int
    flops: float
    host: HostWork | None = None


def survey(
    schedule: Schedule, block_rows: int, block_keys: int, *, cut: str = "", host: bool = False
) -> Survey:
    """Counts what a schedule asks of a kernel with these blocks, of links and of memory.

    Args:
        cut: as `Curve.cut`. host: whether to count `Survey.host` too.
    """
    pack, unpack = copied_bytes(schedule)
    tasks, moves = schedule.tasks, schedule.moves
    received = np.zeros((len(Lane), schedule.world), dtype=np.int64)
    np.add.at(received, (moves["lane"], moves["dst"]), schedule.move_bytes)
    pairs = float((tasks["area"] * (tasks["h1"] - tasks["h0"])).sum())
    return Survey(
        direction=schedule.direction,
        world=schedule.world,
        nsteps=max(schedule.nsteps, 1),
        load=cut_load(schedule, cut) if cut else load_of(schedule, block_rows, block_keys),
        messages=messages_of(schedule),
        pack=pack,
        unpack=unpack,
        received=received,
        area=int(tasks["area"].sum()),
        flops=pairs * flops_per_pair(schedule),
        host=host_work(schedule) if host else None,
    )
