"""The carrier of one rank of many on a GPU: copies that the GPU's own clock holds back.

All of a batch is put on streams when it is posted, and no host waits for anything: a lane's stream
stamps the time, then alternates between the copy of a piece and a kernel that spins until the
piece is due (`device_clock`). Deadlines count from the stamp, so that a late piece does not delay
the next. Sleeping in a host thread between copies was the alternative: it would have to start each
copy and to release each wait, with Python's lock between it and the thread that launches kernels;
`torch.cuda._sleep` would count cycles of a clock that falls under load.

Messages between nodes come from pinned host memory by the copy engine; messages inside a node are
copies inside the device, from a source that stays in its cache, as a peer's writes cost memory
traffic at the target only. The waiting warp needs a place on a core: where a kernel leaves none,
pieces come late, and `Arrival` shows it. Streams have high priority, so that it gets the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ringattn.parallel.device_clock import hold, stamp
from ringattn.parallel.fabric import Handle
from ringattn.parallel.paced import PIECE, Piece, random_bytes

BATCHES = 4096  # stamps kept between two calls of `seconds`
HIGH = -1


@dataclass(frozen=True)
class _Streams:
    """A lane: where receives come from, where sends go, and a stream for either."""

    source: torch.Tensor
    inward: torch.cuda.Stream
    outward: torch.cuda.Stream


@dataclass(frozen=True)
class _Points:
    """Handle of a batch: the ends of its receives and of its sends."""

    events: tuple[Any, ...]
    device: torch.device

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        for event in self.events:
            stream.wait_event(event)


class CudaCarrier:
    """`ringattn.parallel.paced.Carrier` for tensors of one CUDA device.

    Args:
        device: where tensors live.
        host_lanes: lanes whose messages come from and go to pinned host memory.
    """

    def __init__(self, device: torch.device, host_lanes: Sequence[int]) -> None:
        self.device, self._host_lanes = device, tuple(host_lanes)
        self._lanes: dict[int, _Streams] = {}
        self._sinks: dict[int, torch.Tensor] = {}
        self._stamps = torch.zeros((BATCHES, 2), dtype=torch.int64, device=device)
        self._begun = torch.zeros(2, dtype=torch.int64, device=device)
        self._used = 0

    def begin(self) -> None:
        """See `Carrier`."""
        stamp(self._begun)

    def carry(
        self,
        lane: int,
        sends: Sequence[torch.Tensor],
        recvs: Sequence[torch.Tensor],
        plan: Sequence[Piece],
        start: float,
    ) -> Handle:
        """See `Carrier`. Enqueues and returns; the batch starts after what is on the current
        stream."""
        streams = self._streams(lane)
        posted = torch.cuda.current_stream(self.device).record_event()
        streams.inward.wait_event(posted)
        row = self._stamps[self._used]
        self._used += 1
        with torch.cuda.stream(streams.inward):
            if start:
                hold(self._begun, start)
            stamp(row)
            for piece in plan:
                if piece.stop > piece.start:
                    source = streams.source[: piece.stop - piece.start]
                    target = recvs[piece.message][piece.start : piece.stop]
                    target.copy_(source, non_blocking=True)
                hold(row, piece.due)
        events = [streams.inward.record_event()]
        if sends:
            streams.outward.wait_event(posted)
            sink = self._sink(lane, max(tensor.numel() for tensor in sends))
            with torch.cuda.stream(streams.outward):
                for tensor in sends:
                    sink[: tensor.numel()].copy_(tensor, non_blocking=True)
            events.append(streams.outward.record_event())
        return _Points(tuple(events), self.device)

    def seconds(self) -> list[float]:
        """See `Carrier`. By the GPU's clock, from the stamp to the end of the last wait."""
        torch.cuda.synchronize(self.device)
        begin, end = self._stamps[: self._used].T.tolist()
        self._used = 0
        return [1e-9 * (b - a) for a, b in zip(begin, end, strict=True)]

    def _streams(self, lane: int) -> _Streams:
        if lane not in self._lanes:
            source = random_bytes(PIECE, torch.device("cpu"))
            source = source.pin_memory() if self._is_host(lane) else source.to(self.device)
            pair = [torch.cuda.Stream(self.device, priority=HIGH) for _ in range(2)]
            self._lanes[lane] = _Streams(source, *pair)
        return self._lanes[lane]

    def _sink(self, lane: int, size: int) -> torch.Tensor:
        """Somewhere to copy sends to; what is written there is never read."""
        sink = self._sinks.get(lane)
        if sink is None or sink.numel() < size:
            torch.cuda.synchronize(self.device)  # copies to the old one end before it is given back
            host = self._is_host(lane)
            where = torch.device("cpu") if host else self.device
            sink = torch.empty(size, dtype=torch.uint8, device=where, pin_memory=host)
            self._sinks[lane] = sink
        return sink

    def _is_host(self, lane: int) -> bool:
        return lane in self._host_lanes
