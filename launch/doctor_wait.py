"""Waiting for a device, but not for ever."""

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError

import torch

from ringattn.parallel.worker import Worker

_POLL_S = 1e-4


def finish(device: torch.device, deadline: float) -> None:
    """Returns when the device has done all work of the current stream; a CPU always has.

    Args:
        deadline: of `time.monotonic`.

    Raises:
        TimeoutError: the deadline has passed.
    """
    if device.type != "cuda":
        return
    point = torch.cuda.current_stream(device).record_event()
    spin = time.monotonic() + 0.01  # short waits are measured: they do not sleep
    while not point.query():
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"{device} did not finish in time")
        if now > spin:
            time.sleep(_POLL_S)


def call_within(seconds: float, device: torch.device, call: Callable[[], None]) -> None:
    """Calls on a thread of its own, for calls that may block the host without a timeout.

    Raises:
        TimeoutError: it has not returned in time. The thread stays with it.
        Exception: whatever the call raises.
    """

    def job() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has a current device of its own
        call()

    future = Worker("ringattn-doctor").submit(job)
    try:
        future.result(seconds)
    except LateError:
        raise TimeoutError(f"did not return in {seconds:g} s") from None
