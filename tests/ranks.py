"""Real gloo ranks for tests: one pool of processes per world size, started once per session.

    def _sum(rank, world, group, x):
        dist.all_reduce(x, group=group)
        return x

    results = run_ranks(2, _sum, torch.ones(3))     # one result per rank

The function must be at module level. Arguments and results travel by pickle through pipes. A rank
that raises, dies or does not answer fails the test with one message about all ranks, and its pool
is killed, so that the next test starts from fresh processes.
"""

import atexit
import faulthandler
import gc
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ringattn.parallel.processes import exit_with_parent

TIMEOUT = 500.0  # seconds of a call or a command: a hang, never a busy machine
GRACE = 3.0  # seconds that the other ranks get to answer once one has failed
PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "numpy", "ringattn.launch.trainer")
COLLECTIVE_TIMEOUT = timedelta(seconds=900)  # longer than any test: the pool's own timeout rules


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any
) -> list[Any]:
    """Runs ``fn(rank, world_size, group, *args, **kwargs)`` on every rank; returns their results.

    ``group`` is the default gloo process group of the ranks. Every rank runs one thread and starts
    the function from ``torch.manual_seed(0)``. Raises AssertionError naming each rank that raised
    (with its traceback), died (with its exit code) or was silent for ``timeout`` seconds (with
    its stack).
    """
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = RankPool(world_size)
    try:
        return pool.run(fn, args, kwargs, timeout)
    except BaseException:
        del _POOLS[world_size]
        pool.kill()
        raise


def preload(module: str) -> None:
    """Imports a module once for the ranks of all pools made from here on, instead of in each.

    Only before the first pool. The module must start no thread.
    """
    _PRELOAD.append(module)


def close_pools() -> None:
    """Ends every rank of every pool."""
    while _POOLS:
        _POOLS.popitem()[1].kill()


class RankPool:
    """``world_size`` processes joined in one gloo group, serving one call after another."""

    def __init__(self, world_size: int) -> None:
        # A fork server imports what ranks need once, before it starts any thread; each rank is then
        # a cheap fork of it. The store listens on whatever port is free.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, *_PRELOAD])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._stacks: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            pipe, child_pipe = context.Pipe()
            stack, child_stack = context.Pipe(duplex=False)
            process = context.Process(
                target=_serve,
                args=(rank, world_size, self._store.port, child_pipe, child_stack),
                daemon=True,
                name=f"rank-{rank}-of-{world_size}",
            )
            process.start()
            child_pipe.close()
            child_stack.close()
            self._pipes.append(pipe)
            self._stacks.append(stack)
            self._processes.append(process)

    def run(
        self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any], timeout: float
    ) -> list[Any]:
        """Runs one call on all ranks. After an AssertionError the pool must be killed."""
        call = pickle.dumps((fn, args, kwargs))
        failures: dict[int, str] = {}
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(call)
            except OSError:
                failures[rank] = self._obituary(rank)
        results: dict[int, Any] = {}
        self._collect(results, failures, timeout)
        if not failures:
            return [results[rank] for rank in range(len(self._pipes))]
        name = getattr(fn, "__qualname__", repr(fn))
        lines = [f"{name} failed on {len(failures)} of {len(self._pipes)} ranks"]
        lines += [f"--- rank {rank}: {failures[rank].rstrip()}" for rank in sorted(failures)]
        raise AssertionError("\n".join(lines))

    def kill(self) -> None:
        """Ends the processes at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in (*self._pipes, *self._stacks):
            pipe.close()

    def _collect(self, results: dict[int, Any], failures: dict[int, str], timeout: float) -> None:
        """Fills results and failures until every rank stands in one of them."""
        deadline = time.monotonic() + timeout
        pending = set(range(len(self._pipes))) - set(failures)
        while pending:
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
            handles = [self._pipes[rank] for rank in pending]
            handles += [self._processes[rank].sentinel for rank in pending]
            if not wait(handles, max(0.0, deadline - time.monotonic())):
                break
            for rank in sorted(pending):
                self._take_answer(rank, results, failures)
            pending -= results.keys() | failures.keys()
        for rank in sorted(pending):
            reason = "after another rank failed" if failures else f"within {timeout:g} s"
            failures[rank] = f"no answer {reason}; it was at\n{self._stack_of(rank)}"

    def _take_answer(self, rank: int, results: dict[int, Any], failures: dict[int, str]) -> None:
        alive = self._processes[rank].is_alive()  # asked first: a rank may answer and then die
        try:
            if self._pipes[rank].poll():
                ok, payload = pickle.loads(self._pipes[rank].recv_bytes())
                (results if ok else failures)[rank] = payload
            elif not alive:
                failures[rank] = self._obituary(rank)
        except (EOFError, OSError):
            failures[rank] = self._obituary(rank)

    def _obituary(self, rank: int) -> str:
        self._processes[rank].join(GRACE)
        return f"process died, exit code {self._processes[rank].exitcode}"

    def _stack_of(self, rank: int) -> str:
        """Python stack of a silent rank; its signal handler writes even while it waits in C."""
        try:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            chunks = []
            while wait([self._stacks[rank]], 2.0 if not chunks else 0.2):
                chunk = os.read(self._stacks[rank].fileno(), 1 << 16)
                if not chunk:
                    break
                chunks.append(chunk)
            return b"".join(chunks).decode(errors="replace") or "(it does not answer signals)"
        except OSError as error:
            return f"(no stack: {error})"


def _serve(rank: int, world_size: int, port: int, pipe: Connection, stack: Connection) -> None:
    """One rank's main loop: joins the group, then answers calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when ranks end
    faulthandler.register(signal.SIGUSR1, file=stack.fileno(), all_threads=False)
    exit_with_parent()
    torch.set_num_threads(1)
    broken = None
    try:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
    except Exception:
        broken = traceback.format_exc()
    while True:
        try:
            call = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        pipe.send_bytes(_answer(rank, world_size, call, broken))


def _answer(rank: int, world_size: int, call: bytes, broken: str | None) -> bytes:
    """Pickled (True, result) or (False, traceback)."""
    if broken is not None:
        return pickle.dumps((False, f"could not join the group\n{broken}"))
    try:
        fn, args, kwargs = pickle.loads(call)
        torch.manual_seed(0)
        return pickle.dumps((True, fn(rank, world_size, dist.group.WORLD, *args, **kwargs)))
    except BaseException:  # a failed assertion, SystemExit and pytest's own outcomes are all news
        return pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
    finally:
        _end_groups()


def _end_groups() -> None:
    """Ends the groups that a call has made: each has threads that wake many times a second, and
    those of some hundred calls together take both cores of a small machine."""
    made = [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]
    if made:
        while made:
            dist.destroy_process_group(made.pop())
        gc.collect()


_PRELOAD: list[str] = []
_POOLS: dict[int, RankPool] = {}
atexit.register(close_pools)
