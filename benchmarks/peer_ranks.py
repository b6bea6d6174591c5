"""Ranks that prepare, check and time contenders on request.

`RankPool` starts the processes and asks them; a rank that raises, dies or is silent ends the
request with one `PoolError`, after which the pool is gone.
"""

import gc
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ringattn.benchmarks.peers.base import Contender, Prepared, Shape
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.wire import counted_wire
from ringattn.parallel.processes import exit_with_parent

GROUP_TIMEOUT = timedelta(minutes=10)


class PoolError(RuntimeError):
    """What went wrong on the ranks, in one line; `details` holds the traceback."""

    def __init__(self, line: str, details: str = "") -> None:
        super().__init__(line)
        self.details = details


@dataclass(frozen=True)
class Checked:
    """A rank's first run: its rows' positions and results, and what its contender says of it."""

    positions: np.ndarray
    results: tuple[np.ndarray, ...]
    note: str
    planned_bytes: int | None


@dataclass(frozen=True)
class Timed:
    """A rank's timed run: CPU seconds of all its threads, wall seconds, bytes sent to others.

    Bytes are None where the contender's calls are not counted.
    """

    cpu_s: float
    wall_s: float
    sent_bytes: int | None


@dataclass(frozen=True)
class Prepare:
    """Builds a contender's share of a problem and runs it once; answered by `Checked`."""

    contender: Contender
    case: MaskCase
    shape: Shape


@dataclass(frozen=True)
class Time:
    """Runs what was prepared under a contender's name once; answered by `Timed`."""

    name: str


@dataclass(frozen=True)
class Forget:
    """Drops all that was prepared."""


Request = Prepare | Time | Forget


Answer = Callable[[Any, int, int, dict[str, Any]], Any]
"""Answers a request on a rank: request, rank, world, and what is kept between requests."""


class RankPool:
    """`world` processes that serve requests, with `threads` each. Use as a context manager.

    Args:
        device: they talk over gloo, or over NCCL with one GPU each where it is "cuda".
        answer: a function at module level, called on every rank for each request; by default that
            of `Prepare`, `Time` and `Forget`.
        timeout: of the default group.
    """

    def __init__(
        self,
        world: int,
        threads: int = 1,
        device: str = "cpu",
        answer: Answer | None = None,
        timeout: timedelta = GROUP_TIMEOUT,
    ) -> None:
        # Idle OpenMP threads must sleep, or waiting would count as CPU time. DeepSpeed would look
        # for an accelerator otherwise.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["DS_ACCELERATOR"] = device
        self.world = world
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, world, threads, device, self._store.port, there, answer, timeout),
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ask(self, request: Any, timeout: float) -> list[Any]:
        """Every rank's answer, in rank order. Raises PoolError, after which the pool is dead."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            for pipe in self._pipes:
                pipe.send(request)
            while len(answers) < self.world:
                open_pipes = [p for r, p in enumerate(self._pipes) if r not in answers]
                ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise PoolError(f"no answer from {len(open_pipes)} ranks in {timeout:g} s")
                for pipe in ready:
                    assert isinstance(pipe, Connection)
                    rank = self._pipes.index(pipe)
                    answers[rank] = _unpack(rank, pipe.recv())
        except (EOFError, OSError) as error:
            self.kill()
            codes = [process.exitcode for process in self._processes]
            raise PoolError(f"a rank died; exit codes {codes}", repr(error)) from error
        except PoolError:
            self.kill()
            raise
        return [answers[rank] for rank in range(self.world)]

    def kill(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _unpack(rank: int, answer: tuple[bool, Any]) -> Any:
    ok, payload = answer
    if not ok:
        raise PoolError(f"rank {rank}: {payload.strip().splitlines()[-1]}", payload)
    return payload


def _serve(
    rank: int,
    world: int,
    threads: int,
    device: str,
    port: int,
    pipe: Connection,
    answer: Answer | None,
    timeout: timedelta,
) -> None:
    torch.set_num_threads(threads)
    exit_with_parent()
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    kept: dict[str, Any] = {}
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            pipe.send((True, (answer or _answer)(request, rank, world, kept)))
        except Exception:  # the parent reports it and ends the pool
            pipe.send((False, traceback.format_exc()))


def _answer(request: Request, rank: int, world: int, prepared: dict[str, Prepared]) -> Any:
    if isinstance(request, Forget):
        prepared.clear()
        gc.collect()
        return None
    if isinstance(request, Time):
        return _time(prepared[request.name], rank, world)
    made = request.contender.prepare(request.case, request.shape, rank, world)
    prepared[request.contender.name] = made
    # This run also opens connections, compares plans and fills caches, which no later one does.
    # Wider than 16 bits, which NumPy lacks; exact.
    results = tuple(
        (x if x.dtype == torch.float64 else x.float()).cpu().numpy() for x in made.run()
    )
    return Checked(made.positions, results, made.note, made.planned_bytes)


def _time(prepared: Prepared, rank: int, world: int) -> Timed:
    gc.collect()
    dist.barrier()
    with counted_wire(rank, world) as wire:
        _synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        prepared.run()
        _synchronize()
        seconds = time.process_time() - cpu, time.perf_counter() - wall
    return Timed(*seconds, wire.sent if prepared.counted else None)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def assemble(parts: Sequence[Checked], seq_len: int) -> list[torch.Tensor]:
    """Whole out, dq, dk, dv (1, S, heads, D) from every rank's rows; NaN where no rank has one."""
    whole = []
    for index, first in enumerate(parts[0].results):
        tensor = np.full((1, seq_len, *first.shape[2:]), np.nan, dtype=first.dtype)
        for part in parts:
            real = part.positions >= 0
            tensor[:, part.positions[real]] = part.results[index][:, real]
        whole.append(torch.from_numpy(tensor))
    return whole
