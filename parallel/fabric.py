"""The fabric: carries a schedule's messages between ranks, by process group or in one process.

`ringattn.parallel.staged` and `ringattn.parallel.paced` hold others.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringattn.parallel.group_ref import GroupRef

Message = tuple[int, torch.Tensor]  # (peer rank in the group, flat uint8 tensor)


def backend_of(group: dist.ProcessGroup, device_type: str) -> str:
    """The back end that carries a group's tensors of a device type; "" where there is none."""
    pairs = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {device: backend for device, _, backend in pairs}.get(device_type, "")


class Handle(Protocol):
    """A batch of sends and receives under way."""

    def wait(self) -> None:
        """Returns when all receives hold their data and all sends may be overwritten.

        On CUDA it makes the current stream wait, not the host.
        """
        ...


class Fabric(Protocol):
    """Carries flat byte messages between the ranks of a group."""

    rank: int
    world: int
    received_bytes: int

    def open(self, channels: Sequence[tuple[int, bool]]) -> None:
        """Prepares the (lane, long-lived) classes a plan uses. Every rank calls it alike."""
        ...

    def agree(self, digest: str) -> list[int]:
        """Compares a hex digest across the group; returns the ranks that differ from rank 0."""
        ...

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, lane: int, long: bool, tag: int
    ) -> Handle:
        """Starts one batch of sends and receives. Batches of a class start in the same order on
        every rank; `tag` numbers the batch within the schedule."""
        ...


@dataclass
class _Works:
    """Handle over torch.distributed works; keeps the tensors alive until they are done."""

    works: list[Any]
    tensors: list[torch.Tensor]
    timeout: timedelta | None

    def wait(self) -> None:
        for work in self.works:
            if self.timeout is None:
                work.wait()
            else:
                work.wait(self.timeout)


class ProcessGroupFabric:
    """A fabric over a torch.distributed process group (gloo or NCCL).

    NCCL completes a batch as a whole and its first point-to-point batch needs every rank, so each
    (lane, long-lived) class gets a communicator of its own, opened by an all-reduce. Its kernels
    get a stream of high priority: they become ready together with the step's attention kernels,
    and would otherwise start when those leave the GPU. gloo matches messages by tag and needs only
    the one group.

    Args:
        group: the context-parallel group; not kept alive (`GroupRef`).
        device: where tensors live; decides how digests are compared.
        timeout: how long a wait may take; the group's own timeout when None.
    """

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta | None = None
    ) -> None:
        self._group, self.device, self.timeout = GroupRef(group), device, timeout
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.received_bytes = 0
        self._batched = backend_of(group, device.type) == "nccl"
        self._groups: dict[tuple[int, bool], GroupRef] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """The group. Raises RuntimeError when it has been destroyed."""
        return self._group()

    def open(self, channels: Sequence[tuple[int, bool]]) -> None:
        if not self._batched:
            return
        for channel in sorted(set(channels) - set(self._groups)):
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            if self.timeout is not None:
                options._timeout = self.timeout
            group = dist.new_group(
                dist.get_process_group_ranks(self.group),
                timeout=self.timeout,
                backend="nccl",
                pg_options=options,
                use_local_synchronization=True,
            )
            assert isinstance(group, dist.ProcessGroup)
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)
            self._groups[channel] = GroupRef(group)

    def agree(self, digest: str) -> list[int]:
        if self.world == 1:
            return []
        number = int(digest[:15], 16)
        device = self.device if self._batched else torch.device("cpu")
        mine = torch.tensor([number], dtype=torch.int64, device=device)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        work = dist.all_gather(parts, mine, group=self.group, async_op=True)
        assert work is not None
        _Works([work], [mine, *parts], None if self._batched else self.timeout).wait()
        values = torch.cat(parts).tolist()
        return [rank for rank, value in enumerate(values) if value != values[0]]

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, lane: int, long: bool, tag: int
    ) -> Handle:
        self.received_bytes += sum(t.numel() for _, t in recvs)
        tensors = [t for _, t in (*sends, *recvs)]
        if not tensors:
            return _Works([], [], None)
        if self._batched:
            group = self._groups[lane, long]()
            ops = [dist.P2POp(dist.irecv, t, group=group, group_peer=p) for p, t in recvs]
            ops += [dist.P2POp(dist.isend, t, group=group, group_peer=p) for p, t in sends]
            return _Works(dist.batch_isend_irecv(ops), tensors, None)
        works = [dist.irecv(t, group=self.group, group_src=p, tag=tag) for p, t in recvs]
        works += [dist.isend(t, group=self.group, group_dst=p, tag=tag) for p, t in sends]
        return _Works(works, tensors, self.timeout)


@dataclass
class _Mailbox:
    """Messages of all simulated ranks, first in first out per (source, destination, tag)."""

    queues: dict[tuple[int, int, int], deque[torch.Tensor]] = field(default_factory=dict)

    def put(self, key: tuple[int, int, int], tensor: torch.Tensor) -> None:
        self.queues.setdefault(key, deque()).append(tensor.clone())

    def take(self, key: tuple[int, int, int]) -> torch.Tensor:
        queue = self.queues.get(key)
        if not queue:
            raise RuntimeError(f"no message from rank {key[0]} to rank {key[1]} with tag {key[2]}")
        return queue.popleft()


@dataclass
class _Delivery:
    """Handle of simulated receives: copies the messages in when it is waited for."""

    mailbox: _Mailbox
    recvs: list[tuple[tuple[int, int, int], torch.Tensor]]

    def wait(self) -> None:
        for key, tensor in self.recvs:
            tensor.copy_(self.mailbox.take(key))


class LocalFabric:
    """One simulated rank of a group that lives in this process.

    All ranks must have posted a step before any rank waits for it (`simulate` runs them in turn).
    """

    def __init__(self, rank: int, world: int, mailbox: _Mailbox) -> None:
        self.rank, self.world, self._mailbox = rank, world, mailbox
        self.received_bytes = 0

    @classmethod
    def group(cls, world: int) -> list["LocalFabric"]:
        """The endpoints of a simulated group."""
        mailbox = _Mailbox()
        return [cls(rank, world, mailbox) for rank in range(world)]

    def open(self, channels: Sequence[tuple[int, bool]]) -> None:
        """Nothing to open in one process."""

    def agree(self, digest: str) -> list[int]:
        """Simulated ranks share one plan object."""
        del digest
        return []

    def exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], *, lane: int, long: bool, tag: int
    ) -> Handle:
        del lane, long
        self.received_bytes += sum(t.numel() for _, t in recvs)
        for peer, tensor in sends:
            self._mailbox.put((self.rank, peer, tag), tensor)
        return _Delivery(self._mailbox, [((p, self.rank, tag), t) for p, t in recvs])
