"""Waiting on the GPU itself: a stream goes on when the GPU's own clock says so.

`%globaltimer` counts nanoseconds whatever the cores' clock does; it advances in steps of about a
microsecond or less. One warp waits, without shared memory, so that it fits beside other kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def _stamp(row):
    tl.store(row, globaltimer())


@triton.jit(do_not_specialize=["nanoseconds"])
def _hold(row, nanoseconds):
    begin = tl.load(row)
    now = globaltimer()
    while now - begin < nanoseconds:
        now = globaltimer()
    tl.store(row + 1, now)


def stamp(row: torch.Tensor) -> None:
    """Writes the time into row[0], int64 nanoseconds, when the current stream comes to it."""
    _launch(_stamp, row)


def hold(row: torch.Tensor, seconds: float) -> None:
    """Stops the current stream until `seconds` after row[0]; row[1] tells when that was."""
    _launch(_hold, row, round(1e9 * seconds))


def _launch(kernel: Any, *arguments: Any) -> None:
    kernel[(1,)](*arguments, num_warps=1)
