"""The process of one rank: device, threads, process group."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.control import StopRequest
from ringattn.launch.ranks import LOCAL_LAUNCHER, Ranks
from ringattn.launch.reach import check_reach
from ringattn.launch.whereabouts import Whereabouts


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a rank runs on.

    Attributes:
        ranks: its place in the job.
        device: its device. shared: whether other ranks use the same GPU.
        timeout: how long a collective waits for a missing rank.
        where: what this rank does, kept up to date for reports.
        request: whether a scheduler wants the job to save and end.
    """

    ranks: Ranks
    device: torch.device
    timeout: timedelta
    shared: bool = False
    where: Whereabouts = field(default_factory=Whereabouts)
    request: StopRequest = field(default_factory=StopRequest)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the person."""
        return self.ranks.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.ranks.world > 1:
            alone = self.device.type == "cuda" and not self.shared
            dist.barrier(device_ids=[self.device.index] if alone else None)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the ranks of a host run on.

    Attributes:
        device_type: "cpu" or "cuda".
        gpus: GPUs that are used. shared: whether several ranks share one; then gloo joins them.
    """

    device_type: str
    gpus: int = 0
    shared: bool = False


def place_ranks(config: Config, local_world: int) -> Placement:
    """What `local_world` ranks of one host run on, by ``run.device``.

    Raises:
        UserError: ``run.device=cuda`` without a GPU for each rank, or ``cuda_shared`` without any.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = config.run.device
    if wanted == "cuda" and gpus < local_world:
        raise UserError(
            "run.device=cuda",
            f"needs one GPU per rank: {local_world} ranks, {gpus} GPUs on this host",
            "set run.device=cuda_shared or cpu, or lower parallel.dp or parallel.cp"
            if gpus
            else "set run.device=cpu",
        )
    if wanted == "cuda_shared" and not gpus:
        raise UserError(
            "run.device=cuda_shared", "there is no GPU on this host", "set run.device=cpu"
        )
    if wanted == "cpu" or not gpus:
        return Placement(device_type="cpu")
    shared = wanted == "cuda_shared" or gpus < local_world
    return Placement(device_type="cuda", gpus=gpus, shared=shared)


def open_store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """The key-value store that the job's ranks share. Waits for the rank that hosts it.

    Raises:
        UserError: it cannot be reached, or ranks are missing.
    """
    if ranks.launcher == LOCAL_LAUNCHER:
        return dist.HashStore()
    try:
        handler = dist.rendezvous("env://", ranks.rank, ranks.world, timeout=timeout)
        return cast(dist.Store, next(cast(Iterator[Any], handler))[0])
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT={address}",
            f"rank {ranks.rank} on host {socket.gethostname()} could not meet the other ranks "
            f"there within {timeout.total_seconds():g} s ({reason})",
            "check that every rank was started and that its host reaches this address",
        ) from None


@contextmanager
def open_session(
    config: Config,
    ranks: Ranks,
    store: dist.Store,
    where: Whereabouts | None = None,
    request: StopRequest | None = None,
) -> Iterator[Session]:
    """Sets up this process as a rank and joins the default process group; leaves it at the end.

    Sets the number of CPU threads and the deterministic mode, which are properties of the process
    and put back at the end, and the current CUDA device.

    Raises:
        UserError: the device is not there, or hosts cannot reach each other.
    """
    timeout = timedelta(seconds=config.run.timeout_s)
    placement = place_ranks(config, ranks.local_world)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads_per_rank(config, ranks.local_world))
    if config.train.deterministic:
        # cuBLAS reads this when it is first used; without it deterministic products are refused.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device, backend = torch.device("cpu"), "gloo"
    if placement.device_type == "cuda":
        device = torch.device("cuda", ranks.local_rank % placement.gpus)
        torch.cuda.set_device(device)
        backend = "gloo" if placement.shared else "cpu:gloo,cuda:nccl"
    check_reach(ranks, store, os.environ, config.run.timeout_s)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
    )
    finished = False
    try:
        yield Session(
            ranks=ranks,
            device=device,
            timeout=timeout,
            shared=placement.shared,
            where=where or Whereabouts(),
            request=request or StopRequest(),
        )
        finished = True
    finally:
        # After a failure peers may be gone, and an orderly shutdown would wait for them.
        if finished or ranks.world == 1:
            dist.destroy_process_group()
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def threads_per_rank(config: Config, local_world: int) -> int:
    """CPU threads of each rank: as configured, else the usable cores shared by the host's ranks."""
    if config.train.threads_per_rank is not None:
        return config.train.threads_per_rank
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // local_world)
