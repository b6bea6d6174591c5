"""What the ranks agree on before each step: to go on, to leave the step out, or to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
import torch.distributed as dist

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopRequest:
    """Whether a scheduler wants this process to save and end.

    Attributes:
        signal: name of the signal that asked for it; "" while none did.
        heard: whether anybody looks at it. Until then there is nothing to save, and a signal ends
            the process at once, with exit code 0.
    """

    signal: str = ""
    heard: bool = False


@contextmanager
def heeding_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGUSR1, by which schedulers announce a preemption, into a request.

    Outside of the main thread, where signals cannot be handled, none ever comes.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if not request.heard:
            os._exit(0)
        request.signal = signal.Signals(number).name

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in PREEMPTION_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Wanted:
    """What at least one rank wants or has met.

    Attributes:
        stop: a scheduler wants the job to save and end.
        unreadable: the step's data cannot be read.
        unsaved: the save under way has failed.
    """

    stop: bool
    unreadable: bool
    unsaved: bool


@dataclass
class StepControl:
    """Makes ranks decide alike about a step, before its first collective.

    Args:
        group: all ranks of the run; its gloo part is used, so that no GPU is waited for.
        request: this rank's request to stop.
    """

    group: dist.ProcessGroup
    request: StopRequest
    _flags: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int32))

    def agree(self, *, unreadable: bool = False, unsaved: bool = False) -> Wanted:
        """What any rank wants. Every rank calls it before each step; communicates."""
        mine = [bool(self.request.signal), unreadable, unsaved]
        self._flags.copy_(torch.tensor(mine))
        dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self.group)
        stop, unread, failed = map(bool, self._flags.tolist())
        return Wanted(stop=stop, unreadable=unread, unsaved=failed)
