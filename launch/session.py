"""The process of one rank: device, threads, process group."""

import gc
import importlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.binding import choose_cores, on_cores, use_interface
from ringattn.launch.config import Config
from ringattn.launch.control import StopRequest
from ringattn.launch.launchers import export_ranks
from ringattn.launch.mpi import leave_mpi
from ringattn.launch.places import Place, find_places
from ringattn.launch.ranks import LOCAL_LAUNCHER, Ranks
from ringattn.launch.reach import check_reach
from ringattn.launch.rendezvous import join_life
from ringattn.launch.whereabouts import Whereabouts
from ringattn.parallel.cores import read_numa_nodes
from ringattn.parallel.host import usable_cpus, visible_gpus
from ringattn.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a rank runs on.

    Attributes:
        ranks: its place in the job.
        device: its device. shared: whether other ranks use the same GPU.
        timeout: how long a collective waits for a missing rank.
        topology: the nodes of the job; None where nobody looked.
        gpu_sharers: ranks of this host that see the same GPUs; None for all of the host.
        where: what this rank does, kept up to date for reports.
        request: whether a scheduler wants the job to save and end.
    """

    ranks: Ranks
    device: torch.device
    timeout: timedelta
    shared: bool = False
    topology: Topology | None = None
    gpu_sharers: int | None = None
    where: Whereabouts = field(default_factory=Whereabouts)
    request: StopRequest = field(default_factory=StopRequest)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the person."""
        return self.ranks.rank == 0

    @property
    def sharers(self) -> int:
        """Ranks that share the GPUs that this one sees, for `place_ranks`."""
        return self.gpu_sharers or self.ranks.local_world

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
        store = cast(dist.Store, next(cast(Iterator[Any], handler))[0])
        return join_life(store, ranks.rank, ranks.world, timeout)
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

    Finds out who shares this host and its GPUs first, which communicates through `store`. Sets the
    CPUs and the number of CPU threads, and the deterministic mode, which are properties of the
    process and put back at the end; the current CUDA device; and variables that name the network
    interface.

    Raises:
        UserError: the device or the interface is not there, launcher's variables contradict what
            ranks find, or hosts cannot reach each other.
    """
    timeout = timedelta(seconds=config.run.timeout_s)
    ranks, place, topology = find_places(ranks, store, gpus=config.run.device != "cpu")
    if not ranks.placed:
        export_ranks(os.environ, ranks)
    placement = place_ranks(config, place.gpu_sharers)
    shared = placement.shared or (placement.device_type == "cuda" and place.crowded)
    if shared and config.run.device == "cuda":
        raise UserError(
            "run.device=cuda",
            "two ranks of the job have one GPU",
            "start one rank per GPU, or set run.device=cuda_shared",
        )
    device, backend = torch.device("cpu"), "gloo"
    if placement.device_type == "cuda":
        device = torch.device("cuda", place.gpu or 0)
        torch.cuda.set_device(device)
        backend = "gloo" if shared else "cpu:gloo,cuda:nccl"
    use_interface(os.environ, config.run.interface, ranks)
    check_reach(ranks, store, os.environ, config.run.timeout_s)
    with _process_settings(config, place, device):
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
        )
        finished = False
        try:
            yield Session(
                ranks=ranks,
                device=device,
                timeout=timeout,
                shared=shared,
                topology=topology,
                gpu_sharers=place.gpu_sharers,
                where=where or Whereabouts(),
                request=request or StopRequest(),
            )
            finished = True
        finally:
            # After a failure peers may be gone, and an orderly shutdown would wait for them.
            if finished or ranks.world == 1:
                dist.destroy_process_group()
                _let_go_of_groups()
            if finished:
                leave_mpi()


def _let_go_of_groups() -> None:
    """Frees groups that sharded models left in caches and cycles, and so ends their threads.

    `GroupRef` says what threads of a group do to a process that ends before them.
    """
    if "torch.distributed.tensor" in sys.modules:
        sharded = importlib.import_module("torch.distributed.tensor.debug")
        getattr(sharded, "_clear_sharding_prop_cache", lambda: None)()
    gc.collect()


@contextmanager
def _process_settings(config: Config, place: Place, device: torch.device) -> Iterator[None]:
    """CPUs, CPU threads and determinism of this process while inside."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    threads = threads_per_rank(config, place.core_sharers)
    numa = visible_gpus()[device.index].numa if device.type == "cuda" else None
    # The CPUs first: threads inherit them from the one that starts them.
    with on_cores(choose_cores(place, read_numa_nodes(), usable_cpus(), numa)):
        torch.set_num_threads(threads)
        if config.train.deterministic:
            # cuBLAS reads this when it is first used; without it deterministic products are
            # refused.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])


def threads_per_rank(config: Config, sharers: int) -> int:
    """CPU threads of each of the ranks that may use the same CPUs: as configured, else a share."""
    if config.train.threads_per_rank is not None:
        return config.train.threads_per_rank
    return max(1, len(usable_cpus()) // sharers)
