"""Process groups: ranks that are started for one piece of work, and ended with it.

Several groups may take turns on one machine: what disturbs it then disturbs all of them alike.
"""

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
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
"""(ranks, store, turn, *arguments) -> the rank's answer. At module level: it travels by pickle.

``turn()`` returns when it is this group's turn: of several groups one works at a time.
"""

_PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "ringattn.launch.trainer")
_GRACE_S = 3.0  # that other ranks get to say what they saw when one has failed
# Idle OpenMP threads must sleep, or waiting would count as CPU time. The profiler that traces
# memory says when it starts.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "6"}


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


class Group:
    """Runs ``body(ranks, store, turn, *arguments)`` in `world` new processes of this host.

    Use as a context manager: it ends the processes. Call `hear` and `go` in turn.

    Args:
        world: number of processes.
        body: what each does.
        arguments: picklable.
        timeout: seconds after which ranks that say nothing are given up.
    """

    def __init__(self, world: int, body: Body, *arguments: Any, timeout: float) -> None:
        self._timeout = timeout
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        # Each rank is a cheap fork of a server that has imported what they need.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        with mock.patch.dict(os.environ, _ENVIRONMENT):
            for rank in range(world):
                here, there = context.Pipe()
                place = Ranks(
                    rank=rank, world=world, local_rank=rank, local_world=world, launcher="group"
                )
                process = context.Process(
                    target=_serve,
                    args=(place, self._store.port, there, timeout, body, arguments),
                    daemon=True,
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def go(self) -> None:
        """It is this group's turn, for which its ranks wait."""
        for pipe in self._pipes:
            # One that has died since is found by `hear`.
            with suppress(OSError):
                pipe.send(None)

    def hear(self) -> list[Any] | None:
        """Waits for the ranks: their answers in their order, or None once all wait for a turn.

        Raises:
            GroupError: a rank raised, died or was silent for too long.
        """
        said: dict[int, Any] = {}
        failures: list[_Failed] = []
        deadline = time.monotonic() + self._timeout
        while waiting := {p: r for r, p in enumerate(self._pipes) if r not in said}:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = "after another failed" if failures else f"within {self._timeout:g} s"
                silent = (f"rank {rank}: no answer {late}" for rank in waiting.values())
                failures += [_Failed(_SILENT, line) for line in silent]
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                said[rank] = _hear(rank, pipe, self._processes[rank])
                if isinstance(said[rank], _Failed):
                    failures.append(said[rank])
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            first = min(failures, key=lambda failed: failed.grade)
            refused = first.grade in (_OUT_OF_MEMORY, _REFUSED)
            raise GroupError(first.line, refused=refused, details=first.details)
        if said[0] is None:
            return None
        return [said[rank] for rank in range(len(self._pipes))]


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

    def turn() -> None:
        pipe.send(None)
        pipe.recv()

    wait_s = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=wait_s)
        said = body(place, store, turn, *arguments)
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
