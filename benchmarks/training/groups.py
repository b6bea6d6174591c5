"""Process groups: ranks that are started for one piece of work, and ended with it."""

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.ranks import Ranks
from ringattn.parallel.processes import exit_with_parent

Body = Callable[..., Any]
"""(ranks, store, *arguments) -> what the rank answers; at module level, it travels by pickle."""

_GRACE_S = 3.0  # that other ranks get to say what they saw when one has failed
# Idle OpenMP threads must sleep, or waiting would count as CPU time. The profiler that traces
# memory says when it starts.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "5"}


class GroupError(RuntimeError):
    """What went wrong on the ranks, in one line.

    Attributes:
        refused: it is impossible by rule, or memory ran out; else something broke.
        details: a traceback, or "".
    """

    def __init__(self, line: str, *, refused: bool = False, details: str = "") -> None:
        super().__init__(line)
        self.refused, self.details = refused, details


@dataclass(frozen=True)
class _Failed:
    """A rank's last words: how grave, one line, the traceback."""

    grade: int
    line: str
    details: str = ""


_OUT_OF_MEMORY, _REFUSED, _DIED, _RAISED, _SILENT = range(5)
"""Of several ranks' failures the first of these is the cause: peers of a dead rank raise too."""


def run_group(world: int, body: Body, *arguments: Any, timeout: float) -> list[Any]:
    """Runs ``body(ranks, store, *arguments)`` in `world` new processes of this host.

    Args:
        world: number of processes.
        body: what each does.
        arguments: picklable.
        timeout: seconds after which the processes are killed.

    Returns:
        What the ranks returned, in their order.

    Raises:
        GroupError: a rank raised, died or took longer; none is left.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            for rank in range(world):
                here, there = context.Pipe()
                place = Ranks(
                    rank=rank, world=world, local_rank=rank, local_world=world, launcher="group"
                )
                process = context.Process(
                    target=_serve,
                    args=(place, store.port, there, timeout, body, arguments),
                    daemon=True,
                )
                process.start()
                there.close()
                pipes.append(here)
                processes.append(process)
        return _collect(pipes, processes, timeout)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: dict[int, _Failed] = {}
    deadline = time.monotonic() + timeout
    while len(answers) + len(failures) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers | failures}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            line = "after another one failed" if failures else f"within {timeout:g} s"
            failures |= {
                rank: _Failed(_SILENT, f"rank {rank}: no answer {line}")
                for rank in waiting.values()
            }
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            said = _hear(rank, pipe, processes[rank])
            (failures if isinstance(said, _Failed) else answers)[rank] = said
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        first = min(failures.values(), key=lambda failed: failed.grade)
        refused = first.grade in (_OUT_OF_MEMORY, _REFUSED)
        raise GroupError(first.line, refused=refused, details=first.details)
    return [answers[rank] for rank in range(len(pipes))]


def _hear(rank: int, pipe: Connection, process: Any) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        process.join(_GRACE_S)
        code = process.exitcode
        if code == -signal.SIGKILL:
            return _Failed(_DIED, f"rank {rank} was killed, as where the host is out of memory")
        return _Failed(_DIED, f"rank {rank} died, exit code {code}")


def _serve(
    place: Ranks, port: int, pipe: Connection, timeout: float, body: Body, arguments: Any
) -> None:
    exit_with_parent()
    wait_s = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=wait_s)
        said = body(place, store, *arguments)
    except torch.OutOfMemoryError:
        said = _Failed(_OUT_OF_MEMORY, "out of memory")
    except UserError as error:
        said = _Failed(_REFUSED, str(error))
    except Exception as error:
        line = f"rank {place.rank}: {type(error).__name__}: {error}"
        said = _Failed(_RAISED, line.splitlines()[0], traceback.format_exc())
    pipe.send(said)
    pipe.close()
    # Peers that wait for a rank that failed would hold up an orderly end.
    os._exit(0)
