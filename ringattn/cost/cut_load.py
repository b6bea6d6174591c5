"""Kernel work of a schedule for a kernel that cuts tiles into calls of an operator.

Blocks describe a kernel that runs any tile in one launch. The CPU kernel cuts a tile into
rectangles and masked strips and calls an operator for each; a call costs as much as thousands of
pairs, and making a mask costs whatever the number of heads. So the calls are counted as the kernel
makes them.
"""

import numpy as np

from ringattn.cost.kernel_time import Load, flops_per_pair, launches_of, merged_elements
from ringattn.errors import UserError
from ringattn.kernels.cpu_counts import CallCounts, band_counts, block_counts
from ringattn.schedule import Schedule, block_tiles_of, tiles_of

KERNELS = ("cpu_flash",)
"""Kernels whose calls can be counted."""


def cut_load(schedule: Schedule, kernel: str) -> Load:
    """Counts what a kernel of `KERNELS` does for a schedule.

    Raises:
        UserError: another kernel.
    """
    if kernel not in KERNELS:
        raise UserError(f"cut={kernel!r}", f"must be one of {', '.join(KERNELS)}", "pick one")
    shape = (max(schedule.nsteps, 1), schedule.world)
    names = ("pairs", "rows", "keys", "calls", "masks", "matrix", "products")
    sums = {name: np.zeros(shape) for name in names}
    launches, merged = np.zeros(shape), np.zeros(shape)
    tasks, rate = schedule.tasks, flops_per_pair(schedule)
    if len(tasks):
        order, first = launches_of(tasks, tasks["step"] * schedule.world + tasks["rank"])
        added = merged_elements(schedule, tasks[order], first)
        for members, elements in zip(np.split(order, first[1:]), added, strict=True):
            where = tasks["step"][members[0]], tasks["rank"][members[0]]
            found = launch_counts(schedule, tasks[members])
            for name in names:
                sums[name][where] += getattr(found, name)
            launches[where] += 1
            merged[where] += elements
    return Load(
        pairs=sums["pairs"] * rate,
        rows=sums["rows"] * rate,
        keys=sums["keys"] * rate,
        tiles=sums["calls"],
        launches=launches,
        longest=np.zeros(shape),
        merged=merged,
        masks=sums["masks"],
        matrix=sums["matrix"] * rate,
        products=sums["products"],
    )


def launch_counts(schedule: Schedule, tasks: np.ndarray) -> CallCounts:
    """The calls of the tasks of one launch."""
    group = schedule.shapes.q_heads // schedule.shapes.kv_heads
    backward = schedule.direction == "backward"
    found = band_counts(tiles_of(tasks), group, backward=backward)
    blocks = block_tiles_of(tasks, schedule.matrices)
    if blocks is not None:
        found += block_counts(blocks, tasks["area"][tasks["matrix"] >= 0], group)
    return found
