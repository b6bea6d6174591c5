"""What a rank's kernel is asked for, in the figures that a kernel is chosen by."""

import numpy as np

from ringattn.blocks import is_open
from ringattn.cost.kernel_time import computed_pairs, pair_flops
from ringattn.kernels.measured import Work
from ringattn.schedule import Schedule, bands_of

BLOCK = 128


def work_of(schedule: Schedule, rank: int) -> Work | None:
    """The work of a rank in one direction, over all its launches; None where it has none.

    Depends on the schedule alone. Costs a pass over the rank's tasks.
    """
    tasks = schedule.tasks[schedule.tasks["rank"] == rank]
    heads = tasks["h1"] - tasks["h0"]
    pairs = float((tasks["area"] * heads).sum())
    if not pairs:
        return None
    bands, shapes = bands_of(tasks), schedule.shapes
    launch = _launch(tasks)
    computed = computed_pairs(tasks, schedule.matrices, BLOCK, BLOCK)
    rows = -((bands["q0"] - bands["q1"]) // bands["step"])
    has_blocks = bool((tasks["matrix"] >= 0).any())
    return Work(
        direction=schedule.direction,
        group=shapes.q_heads // shapes.kv_heads,
        qk_dim=shapes.qk_dim,
        v_dim=shapes.v_dim,
        flops=pairs * pair_flops(shapes, schedule.direction) / (int(launch.max()) + 1),
        keys_per_row=pairs / float((rows * heads).sum()),
        tile_pairs=float(tasks["area"].mean()),
        fill=min(1.0, pairs / float((computed * heads).sum())),
        plain=not has_blocks and _is_plain(tasks, bands, launch),
        blocks=has_blocks,
    )


def _launch(tasks: np.ndarray) -> np.ndarray:
    """The number of each task's launch: tasks of a step that share their operand slots."""
    keys = np.stack([tasks[n] for n in ("step", "qslot", "kslot", "oslot", "gslot")], axis=1)
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _is_plain(tasks: np.ndarray, bands: np.ndarray, launch: np.ndarray) -> bool:
    """Whether all tiles are full or causal, of all heads, and share no rows and keys."""
    square = bands["q1"] - bands["q0"] == bands["k1"] - bands["k0"]
    triangle = square & (bands["hi"] == bands["k0"] - bands["q0"])
    triangle &= bands["lo"] <= bands["k0"] - (bands["q1"] - 1)
    if (bands["step"] > 1).any() or not (is_open(bands) | triangle).all():
        return False
    if len(np.unique(tasks["h0"])) > 1 or len(np.unique(tasks["h1"])) > 1:
        return False
    return all(_are_disjoint(bands[a + "0"], bands[a + "1"], launch) for a in "qk")


def _are_disjoint(first: np.ndarray, last: np.ndarray, launch: np.ndarray) -> bool:
    order = np.lexsort((first, launch))
    same = launch[order][1:] == launch[order][:-1]
    return not (same & (first[order][1:] < last[order][:-1])).any()
