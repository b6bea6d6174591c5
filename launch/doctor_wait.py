"""Waiting for a device, but not for ever."""

import time

import torch

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
