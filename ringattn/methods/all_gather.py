"""All-gather: every rank receives all keys and values at once; dK and dV are reduce-scattered.

Source: the all-gather context parallelism of Llama 3 (arXiv 2407.21783, section 3.3.2). Moves
do not depend on the mask. Bytes received per rank for equal shards: forward 2 (P-1) u Hkv e,
backward 2 (P-1) u Hkv (e + g). Local work hides the gather; half of it waits to hide the return.
"""

import numpy as np

from ringattn.methods.common import Problem
from ringattn.methods.gather import Runs, gather
from ringattn.schedule import Schedule


def _everything(problem: Problem) -> Runs:
    ranges = problem.layout.ranges
    receiver, segment = (x.ravel() for x in np.indices((problem.world, len(ranges))))
    remote = ranges["owner"][segment] != receiver
    receiver, segment = receiver[remote], segment[remote]
    order = np.lexsort((ranges["start"][segment], receiver))
    receiver, segment = receiver[order], segment[order]
    part = ranges[segment]
    count = (part["stop"] - part["start"]) // part["step"]
    return Runs(receiver, segment, part["offset"], part["offset"] + count)


def forward(problem: Problem) -> Schedule:
    """Plans the forward. Pure host work; every rank builds the same schedule."""
    return gather(problem, "forward", "all_gather", lambda: _everything(problem), 1)


def backward(problem: Problem) -> Schedule:
    """Plans the backward. Pure host work; every rank builds the same schedule."""
    return gather(problem, "backward", "all_gather", lambda: _everything(problem), 1)
