"""What pricing a schedule returns: times, bytes, and a timeline to draw."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ringattn.schedule import Direction, Lane


@dataclass(frozen=True, eq=False, kw_only=True)
class Priced:
    """A priced schedule, per batch element. Times in seconds from the start of the direction.

    Attributes:
        direction: forward or backward.
        seconds: until the slowest rank is done. rank_seconds: of each rank, (P,).
        compute: kernel time of each rank, merges of launches included, (P,).
        copies: packing, unpacking and landing of each rank, (P,).
        begin, end: compute of each step and rank, (steps, P).
        src, dst, lane, nbytes, sent, done: messages, one entry each: who, over which lane, how
            many bytes, first and last second on the wire.
        received: bytes that each rank receives, int64 (lanes, P).
        carrying: CPU seconds of each rank for its messages, (P,), where ranks share CPU cores.
        area: mask area over all tasks. flops: exact FLOPs of all ranks, masked pairs not counted.
    """

    direction: Direction
    seconds: float
    rank_seconds: np.ndarray
    compute: np.ndarray
    copies: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    src: np.ndarray
    dst: np.ndarray
    lane: np.ndarray
    nbytes: np.ndarray
    sent: np.ndarray
    done: np.ndarray
    received: np.ndarray
    area: int
    flops: float
    carrying: np.ndarray | None = None

    @property
    def exposed(self) -> np.ndarray:
        """Seconds of each rank in which it neither computes nor copies, (P,)."""
        return np.maximum(self.rank_seconds - self.compute - self.copies, 0.0)

    @property
    def imbalance(self) -> float:
        """Kernel time of the busiest rank over the mean; 1 without work."""
        mean = self.compute.mean()
        return float(self.compute.max() / mean) if mean else 1.0

    @property
    def tflops_per_rank(self) -> float:
        """Useful TFLOP/s of a rank: exact mask FLOPs over the slowest rank's time; 0 without."""
        world = len(self.compute)
        return self.flops / (1e12 * world * self.seconds) if self.seconds else 0.0

    def trace(self) -> list[dict[str, Any]]:
        """Complete events of the Chrome trace format (microseconds), one process per rank."""
        events: list[dict[str, Any]] = []
        for step, rank in zip(*np.nonzero(self.end > self.begin), strict=True):
            start, stop = float(self.begin[step, rank]), float(self.end[step, rank])
            events.append(_event(f"step {step}", int(rank), "compute", start, stop))
        for index in range(len(self.src)):
            name = f"{int(self.nbytes[index])} bytes from rank {self.src[index]}"
            lane = Lane(int(self.lane[index])).name.lower()
            start, stop = float(self.sent[index]), float(self.done[index])
            events.append(_event(name, int(self.dst[index]), lane, start, stop))
        return events


def _event(name: str, rank: int, row: str, start: float, stop: float) -> dict[str, Any]:
    return {
        "name": name, "ph": "X", "pid": rank, "tid": row,
        "ts": 1e6 * start, "dur": 1e6 * (stop - start),
    }  # fmt: skip
