"""A fabric that stages messages through host memory, so that ranks may share a GPU.

NCCL refuses two ranks on one device, and gloo carries no CUDA tensors from rank to rank. Here a
message goes device → pinned host buffer → gloo → pinned host buffer → device. It is for testing the
CUDA path with real processes, not for speed.

Each (lane, long-lived) class has a stream and a thread for either direction. The thread that posts
only records an event, starts the copies to the host and posts gloo's receives; nothing waits. The
sending thread waits for its copies and hands them to gloo; the receiving thread waits for gloo and
starts each copy to the device as soon as its message is there. The batches of a class go through
its threads in the order of posting, which is the same on every rank, and sends never wait behind
receives: ranks cannot wait for each other in a circle. Whatever fails in a thread, a timeout
included, is raised by the batch's `wait`, and by every later exchange.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.parallel.fabric import Handle, Message, ProcessGroupFabric, backend_of
from ringattn.parallel.worker import Worker


class Copies(Protocol):
    """What staging needs of a device: streams, copies on them, points in time."""

    def stream(self) -> Any:
        """A new queue of copies."""
        ...

    def host(self, size: int) -> torch.Tensor:
        """A host buffer of `size` bytes, uint8."""
        ...

    def mark(self) -> Any:
        """The point that the current stream has come to."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any, after: Any) -> Any:
        """Starts a copy on a stream, not before the point `after`; returns the point of its end."""
        ...

    def reached(self, point: Any) -> None:
        """Blocks the calling thread until a point is reached."""
        ...

    def join(self, point: Any) -> None:
        """Lets the current stream wait for a point."""
        ...


class HostCopies:
    """`Copies` for CPU tensors: a copy is done when it returns."""

    def stream(self) -> Any:
        """See `Copies`."""

    def host(self, size: int) -> torch.Tensor:
        """See `Copies`."""
        return torch.empty(size, dtype=torch.uint8)

    def mark(self) -> Any:
        """See `Copies`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any, after: Any) -> Any:
        """See `Copies`."""
        del stream, after
        target.copy_(source)

    def reached(self, point: Any) -> None:
        """See `Copies`."""

    def join(self, point: Any) -> None:
        """See `Copies`."""


class CudaCopies:
    """`Copies` for tensors of one CUDA device.

    Tensors are made on the stream that posts, and copied on others. They need no `record_stream`:
    that stream waits for the last copy before the executor gives them back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self) -> torch.cuda.Stream:
        """See `Copies`."""
        return torch.cuda.Stream(self.device)

    def host(self, size: int) -> torch.Tensor:
        """See `Copies`. PyTorch keeps pinned memory, and gives none back that a copy still uses."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """See `Copies`."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any, after: Any) -> Any:
        """See `Copies`."""
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event(torch.cuda.Event(blocking=True))

    def reached(self, point: Any) -> None:
        """See `Copies`."""
        point.synchronize()

    def join(self, point: Any) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self.device).wait_event(point)


@dataclass(frozen=True)
class _Lane:
    """The threads and streams of a class: to the host and out, in and to the device."""

    sender: Worker
    receiver: Worker
    outward: Any
    inward: Any


@dataclass
class _Batch:
    """Handle of a batch: the jobs that carry it, and the copies that its receives end with."""

    copies: Copies
    jobs: "list[Future[None]]" = field(default_factory=list)
    landed: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        for job in self.jobs:
            job.result()  # gloo's timeouts bound it
        for point in self.landed:
            self.copies.join(point)


class StagedFabric:
    """See the module docstring. Implements `ringattn.parallel.fabric.Fabric`.

    Args:
        group: the context-parallel group; its back end for CPU tensors must be gloo.
        device: where tensors live.
        timeout: how long a message may take from its posting; the group's own timeout when None.
        copies: how the device copies; made for the device by default.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: timedelta | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._wire = ProcessGroupFabric(group, torch.device("cpu"), timeout)
        self.rank, self.world, self.received_bytes = self._wire.rank, self._wire.world, 0
        cuda = device.type == "cuda"
        self._copies = copies or (CudaCopies(device) if cuda else HostCopies())
        self._lanes: dict[tuple[int, bool], _Lane] = {}
        self._failures: list[str] = []

    @property
    def timeout(self) -> timedelta | None:
        """How long a message may take; counts for exchanges to come."""
        return self._wire.timeout

    @timeout.setter
    def timeout(self, value: timedelta | None) -> None:
        self._wire.timeout = value

    def open(self, channels: Sequence[tuple[int, bool]]) -> None:
        """Starts the threads of the classes. Nothing is communicated."""
        for lane, long in set(channels) - set(self._lanes):
            name = f"ringattn lane {lane}{' long' if long else ''}"
            streams = self._copies.stream(), self._copies.stream()
            workers = Worker(f"{name} send"), Worker(f"{name} receive")
            self._lanes[lane, long] = _Lane(*workers, *streams)

    def agree(self, digest: str) -> list[int]:
        """See `Fabric`."""
        return self._wire.agree(digest)

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, lane: int, long: bool, tag: int
    ) -> Handle:
        """See `Fabric`. Raises RuntimeError when an earlier exchange has failed: messages of it may
        still arrive, and ranks are no longer at the same place."""
        if self._failures:
            raise RuntimeError(f"an earlier exchange failed: {self._failures[0]}")
        self.received_bytes += sum(t.numel() for _, t in recvs)
        copies, batch = self._copies, _Batch(self._copies)
        if not sends and not recvs:
            return batch
        path, ready = self._lanes[lane, long], copies.mark()
        numbers: dict[str, Any] = {"lane": lane, "long": long, "tag": tag}
        arrivals = []
        for peer, tensor in recvs:
            host = copies.host(tensor.numel())
            arrivals.append((self._wire.exchange([], [(peer, host)], **numbers), host, tensor))
        outgoing = []
        for peer, tensor in sends:
            host = copies.host(tensor.numel())
            outgoing.append((peer, host, copies.copy(host, tensor, path.outward, ready)))

        def send() -> None:
            works = []
            for peer, host, point in outgoing:
                copies.reached(point)
                works.append(self._wire.exchange([(peer, host)], [], **numbers))
            for work in works:
                work.wait()

        def receive() -> None:
            for work, host, tensor in arrivals:
                work.wait()
                if not self._failures:  # the tensor may be in other hands once a run has failed
                    batch.landed.append(copies.copy(tensor, host, path.inward, ready))

        batch.jobs.append(path.sender.submit(lambda: self._noting_failure(send)))
        batch.jobs.append(path.receiver.submit(lambda: self._noting_failure(receive)))
        return batch

    def _noting_failure(self, job: Callable[[], None]) -> None:
        if self._failures:
            raise RuntimeError(f"an earlier exchange failed: {self._failures[0]}")
        try:
            job()
        except Exception as error:
            self._failures.append(str(error))
            raise


def check_staging(staged: object, group: dist.ProcessGroup | None) -> None:
    """Raises UserError unless tensors of the device type `staged` (or None) can be staged."""
    what = f"staged={staged!r}"
    if staged is None:
        return
    if staged not in ("cpu", "cuda"):
        raise UserError(what, "must be 'cuda', 'cpu' or None", "name the tensors' device type")
    if group is None:
        raise UserError(what, "needs a process group", "leave it out for simulated ranks")
    if backend_of(group, "cpu") != "gloo":
        raise UserError(
            what,
            f"goes over gloo, the group has {dist.get_backend_config(group)}",
            'start it with backend "gloo" or "cpu:gloo,cuda:nccl"',
        )
    if staged == "cuda" and not torch.cuda.is_available():
        raise UserError(what, "there is no CUDA device", "leave it out for CPU tensors")
