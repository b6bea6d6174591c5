"""Ranks that are slower than the others: measured by what they do without waiting for anyone.

Ranks that share sequences wait for each other in every attention call, so all of them take equally
long over a step. What tells them apart is the time before, between and after those calls.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

import ringattn as ra
from ringattn.launch.config import FaultsConfig
from ringattn.launch.feed import PlanAttend, Share

_LEAST_S = 0.02  # what a step takes longer for is not worth a word below


class OwnWork:
    """Adds up the time of a step's forwards outside of communication.

    On a GPU it is time on the current stream. Nothing is measured outside of `forward`, so what a
    backward pass computes again does not count.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._active = False
        self._since: float | torch.cuda.Event | None = None
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measures what is done inside, between `resume` and `pause`."""
        self._active = True
        self.resume()
        try:
            yield
            self.pause()
        finally:
            self._active, self._since = False, None

    def pause(self) -> None:
        """Other ranks are waited for from here on."""
        if self._since is None:
            return
        begin, end = self._since, self._now()
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._spans.append((begin, end))
        elif isinstance(begin, float) and isinstance(end, float):
            self._seconds += end - begin
        self._since = None

    def resume(self) -> None:
        """This rank works by itself again."""
        if self._active and self._since is None:
            self._since = self._now()

    def take(self) -> float:
        """Seconds measured since the last call. Waits for the end of the last forward."""
        if self._spans:
            self._spans[-1][1].synchronize()
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self._spans)
        seconds = self._seconds + milliseconds / 1000
        self._spans, self._seconds = [], 0.0
        return seconds

    def timed(self, share: Share) -> Share:
        """The share with an `Attend` that is left out of the measure."""
        return replace(share, attend=[TimedAttend(attend.plan, self) for attend in share.attend])

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class TimedAttend(PlanAttend):
    """Attention during which `work` is paused."""

    work: OwnWork

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `PlanAttend`."""
        self.work.pause()
        out = super().__call__(q, k, v)
        self.work.resume()
        return out

    def recalled(
        self, recall: ra.Recall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """See `PlanAttend`."""
        self.work.pause()
        out = super().recalled(recall, q, k, v)
        self.work.resume()
        return out


@dataclass(frozen=True)
class Straggler:
    """A rank that has been slow for a while.

    Attributes:
        rank: its number. seconds: its own work in the last step. median: that of all ranks.
        steps: how long it has been slow.
    """

    rank: int
    seconds: float
    median: float
    steps: int

    def line(self, host: str) -> str:
        """For a person."""
        return (
            f"rank {self.rank} on {host} is slow: {self.seconds:.3g} s of its own work in the "
            f"forward against a median of {self.median:.3g} s, {self.steps} steps in a row"
        )


class Stragglers:
    """Finds ranks that are slow again and again. Every rank sees the same figures.

    Args:
        faults: from which ratio to the median, and for how many steps.
    """

    def __init__(self, faults: FaultsConfig) -> None:
        self._factor, self._steps = faults.straggler_factor, faults.straggler_steps
        self._slow_for: dict[int, int] = {}

    def update(self, seconds: Sequence[float]) -> list[Straggler]:
        """Ranks that have been slow for ``straggler_steps`` steps with this one.

        Each is named once, and again only after a step in which it was not slow.

        Args:
            seconds: own work of each rank in a step.
        """
        middle = median(seconds)
        if len(seconds) < 2 or not self._factor or not middle:
            return []
        least = max(self._factor * middle, middle + _LEAST_S)
        slow = [rank for rank, own in enumerate(seconds) if own > least]
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        return [
            Straggler(rank, seconds[rank], middle, count)
            for rank, count in self._slow_for.items()
            if count == self._steps
        ]


def median(seconds: Sequence[float]) -> float:
    """The lower one of an even number, so that one of two ranks can be slow beside the other."""
    return statistics.median_low(seconds)


def slowest(seconds: Sequence[float]) -> tuple[int, float] | tuple[None, None]:
    """The slowest rank and its seconds over the median; None on one rank, or without any work."""
    middle = median(seconds)
    if len(seconds) < 2 or not middle:
        return None, None
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return rank, seconds[rank] / middle
