"""A fabric of one rank of many: what the rank receives is made here, at the pace of a network.

The rank runs its part of a real plan; its peers do not exist. A batch of messages starts when the
rank has posted it, its lane is free and its peers are said to be ready. Its receives are filled
piece by piece, each with a deadline, so that the last byte lands when the network would have
brought it. Sends cost their copy out of the rank's memory and nothing else; as with NCCL, a batch
completes as a whole, when its slowest message would have.

What arrives is random: the bytes of normally distributed bfloat16 numbers, which are also finite
numbers of sensible size as float16, float32 and float64, so that any payload is valid.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ringattn.parallel.fabric import Handle, Message
from ringattn.parallel.worker import Worker

PIECE = 8 << 20  # bytes; at most so many arrive at once


@dataclass(frozen=True)
class Timing:
    """When a batch arrives, in seconds after it started: its first byte and its last.

    It starts no earlier than `start` seconds after the run began, when its peers are ready.
    """

    first: float
    last: float
    start: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of receive number `message`, and the second by which they are there."""

    message: int
    start: int
    stop: int
    due: float


@dataclass(frozen=True)
class Arrival:
    """One batch as it went: its tag, lane and received bytes, and asked and achieved seconds."""

    tag: int
    lane: int
    nbytes: int
    asked: float
    achieved: float


def pieces(sizes: Sequence[int], timing: Timing, most: int = PIECE) -> list[Piece]:
    """Cuts receives of these sizes into pieces of at most `most` bytes, evenly paced.

    A batch without receives is one empty piece that is due at the end: its sends hold the lane.
    """
    total, done, found = sum(sizes), 0, []
    for message, size in enumerate(sizes):
        for start in range(0, size, most):
            stop = min(start + most, size)
            due = timing.first + (timing.last - timing.first) * (done + stop) / total
            found.append(Piece(message, start, stop, due))
        done += size
    return found or [Piece(0, 0, 0, timing.last)]


def random_bytes(size: int, device: torch.device) -> torch.Tensor:
    """uint8 (size,): normally distributed bfloat16 numbers, the same every time."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(-(-size // 2), generator=generator).bfloat16()
    return numbers.view(torch.uint8)[:size].to(device)


class Carrier(Protocol):
    """Fills the receives of batches on time, on some kind of device."""

    def begin(self) -> None:
        """A run begins, as soon as the current stream comes to it. None may be under way."""
        ...

    def carry(
        self,
        lane: int,
        sends: Sequence[torch.Tensor],
        recvs: Sequence[torch.Tensor],
        plan: Sequence[Piece],
        start: float,
    ) -> Handle:
        """Starts a batch behind those that its lane carries already, and not before the second
        `start` of the run."""
        ...

    def seconds(self) -> list[float]:
        """How long each batch took since the last call, in their order. Waits for them."""
        ...


class PacedFabric:
    """See the module docstring. Implements `ringattn.parallel.fabric.Fabric`.

    Args:
        rank, world: the rank that is played, and of how many.
        timings: of every batch of the rank, by tag.
        carrier: fills the receives.
    """

    def __init__(
        self, rank: int, world: int, timings: Mapping[int, Timing], carrier: Carrier
    ) -> None:
        self.rank, self.world, self.received_bytes = rank, world, 0
        self._timings, self._carrier = timings, carrier
        self._batches: list[tuple[int, int, int]] = []

    def open(self, channels: Sequence[tuple[int, bool]]) -> None:
        """Begins a run."""
        self._carrier.begin()

    def agree(self, digest: str) -> list[int]:
        """There is nobody to disagree."""
        del digest
        return []

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, lane: int, long: bool, tag: int
    ) -> Handle:
        """See `Fabric`. Long-lived batches share their lane with the others."""
        del long
        if not sends and not recvs:
            return _Done()
        targets = [tensor for _, tensor in recvs]
        sizes = [tensor.numel() for tensor in targets]
        self.received_bytes += sum(sizes)
        self._batches.append((tag, lane, sum(sizes)))
        timing = self._timings[tag]
        plan, sources = pieces(sizes, timing), [tensor for _, tensor in sends]
        return self._carrier.carry(lane, sources, targets, plan, timing.start)

    def arrivals(self) -> list[Arrival]:
        """All batches since the last call; waits for them."""
        batches, self._batches = self._batches, []
        return [
            Arrival(tag, lane, nbytes, self._timings[tag].last, seconds)
            for (tag, lane, nbytes), seconds in zip(batches, self._carrier.seconds(), strict=True)
        ]


class _Done:
    """Handle of nothing."""

    def wait(self) -> None:
        """Returns at once."""


class Clock(Protocol):
    """Seconds, and waiting for one."""

    def now(self) -> float:
        """The second it is."""
        ...

    def until(self, second: float) -> None:
        """Blocks until then."""
        ...


class SystemClock:
    """The machine's clock; threads sleep."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def until(self, second: float) -> None:
        """See `Clock`."""
        time.sleep(max(0.0, second - time.perf_counter()))


@dataclass(frozen=True)
class _Filling:
    """Handle of a batch that a thread carries."""

    job: "Future[None]"

    def wait(self) -> None:
        self.job.result()


class HostCarrier:
    """`Carrier` for CPU tensors: a thread per lane copies each piece and sleeps until it is due."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._source = random_bytes(PIECE, torch.device("cpu"))
        self._lanes: dict[int, Worker] = {}
        self._jobs: list[Future[None]] = []
        self._seconds: list[float] = []
        self._begun = self._clock.now()

    def begin(self) -> None:
        """See `Carrier`."""
        self._begun = self._clock.now()

    def carry(
        self,
        lane: int,
        sends: Sequence[torch.Tensor],
        recvs: Sequence[torch.Tensor],
        plan: Sequence[Piece],
        start: float,
    ) -> Handle:
        """See `Carrier`."""
        if lane not in self._lanes:
            self._lanes[lane] = Worker(f"ringattn paced lane {lane}")
        number = len(self._seconds)
        self._seconds.append(0.0)
        fill = partial(self._fill, number, sends, recvs, plan, self._begun + start)
        job = self._lanes[lane].submit(fill)
        self._jobs.append(job)
        return _Filling(job)

    def _fill(
        self,
        number: int,
        sends: Sequence[torch.Tensor],
        recvs: Sequence[torch.Tensor],
        plan: Sequence[Piece],
        earliest: float,
    ) -> None:
        self._clock.until(earliest)
        start = self._clock.now()
        for tensor in sends:
            tensor.clone()
        for piece in plan:
            if piece.stop > piece.start:
                source = self._source[: piece.stop - piece.start]
                recvs[piece.message][piece.start : piece.stop].copy_(source)
            self._clock.until(start + piece.due)
        self._seconds[number] = self._clock.now() - start

    def seconds(self) -> list[float]:
        """See `Carrier`."""
        for job in self._jobs:
            job.result()
        found, self._seconds, self._jobs = self._seconds, [], []
        return found
