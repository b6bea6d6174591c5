"""The ranks that attention suites ask: processes of this host, or those of a launcher's job.

Both answer the same requests (`worker.Worker.answer`). Of local ranks a group that fails is
started again, so that a hanging or dying one costs a single cell. A launcher's ranks cannot be
started again from inside: there the run ends after the cell is recorded, and goes on when the
command is run again.
"""

import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from ringattn.benchmarks.peer_ranks import PoolError, RankPool
from ringattn.benchmarks.suites.worker import Worker, serve
from ringattn.launch.session import Session

START_S = 120.0  # seconds that ranks may take to start


class RanksError(RuntimeError):
    """A request failed, in one line. fatal: nothing more can be asked."""

    def __init__(self, line: str, fatal: bool = False) -> None:
        super().__init__(line)
        self.fatal = fatal


class AskedRanks(Protocol):
    """Ranks that can be asked."""

    @property
    def device(self) -> str:
        """Device type of the ranks."""
        ...

    @property
    def worlds(self) -> tuple[int, ...] | None:
        """Numbers of ranks that can be asked; None for any."""
        ...

    def ask(self, world: int, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every rank's answer. Raises RanksError; what the ranks held may then be gone."""
        ...

    def lives(self, world: int) -> int:
        """How often these ranks were started: what they held is gone where it has changed."""
        ...


class LocalRanks:
    """Groups of processes on this host, by their number; started when they are first asked.

    Args:
        device: "auto", "cpu" or "cuda". threads: of each rank. timeout: seconds of a request.
    """

    worlds = None

    def __init__(self, stack: ExitStack, device: str, threads: int, timeout: float) -> None:
        gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
        self.device = "cuda" if gpus else "cpu"
        self._stack, self._gpus, self._threads, self._timeout = stack, gpus, threads, timeout
        self._pools: dict[int, RankPool] = {}
        self._lives: dict[int, int] = {}

    def lives(self, world: int) -> int:
        """See `AskedRanks`."""
        return self._lives.get(world, 0)

    def ask(self, world: int, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `AskedRanks`."""
        try:
            if world not in self._pools:
                self._start(world)
            return self._pools[world].ask(request, self._timeout)
        except PoolError as error:
            self._pools.pop(world, None)
            raise RanksError(str(error)) from None

    def _start(self, world: int) -> None:
        self._lives[world] = self.lives(world) + 1
        pool = RankPool(
            world,
            self._threads,
            "cuda" if self._gpus >= world else "cpu",  # else they share GPUs, over gloo
            serve,
            timedelta(seconds=max(self._timeout, START_S)),
        )
        self._pools[world] = self._stack.enter_context(pool)
        terms = {"do": "open", "gpus": self._gpus, "timeout": self._timeout}
        pool.ask(terms, START_S)


class LaunchedRanks:
    """The ranks of a launcher's job, asked over the job's store by rank 0, which is one of them.

    On the others `serve` answers until rank 0 calls `end`.
    """

    def __init__(self, session: Session, timeout: float) -> None:
        self._rank, self._world = session.ranks.rank, session.ranks.world
        staged = "cuda" if session.shared else None
        self._worker = Worker(self._rank, self._world, session.device, staged, timeout)
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("ringattn/bench", store)
        self._session, self._timeout, self._number = session, timeout, 0
        self.device = session.device.type

    @property
    def worlds(self) -> tuple[int, ...]:
        """See `AskedRanks`."""
        return (self._world,)

    def lives(self, world: int) -> int:
        """See `AskedRanks`."""
        del world
        return 1

    def ask(self, world: int, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """See `AskedRanks`; rank 0 alone calls it."""
        assert world == self._world
        self._number += 1
        self._store.set(f"ask {self._number}", json.dumps(request))
        self._session.where.enter(f"bench: {request['do']}")
        answers = [self._own(request)]
        deadline = time.monotonic() + self._timeout
        for rank in range(1, world):
            key = f"answer {self._number} {rank}"
            try:
                left = max(1.0, deadline - time.monotonic())
                self._store.wait([key], timedelta(seconds=left))
            except RuntimeError:
                raise RanksError(f"no answer from rank {rank}", fatal=True) from None
            answers.append(unpacked(self._store.get(key)))
            self._store.delete_key(key)
        wrong = [f"rank {r}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        if wrong:
            raise RanksError(wrong[0], fatal=len(wrong) < world)
        return answers

    def serve(self) -> None:
        """Answers rank 0's requests until it ends; every other rank calls it."""
        while True:
            self._number += 1
            self._wait(f"ask {self._number}")
            request = json.loads(self._store.get(f"ask {self._number}"))
            if request["do"] == "end":
                return
            self._session.where.enter(f"bench: {request['do']}")
            key = f"answer {self._number} {self._rank}"
            self._store.set(key, packed(self._own(request)))  # pyright: ignore[reportArgumentType]

    def end(self) -> None:
        """Lets the other ranks go."""
        self._number += 1
        self._store.set(f"ask {self._number}", json.dumps({"do": "end"}))

    def _own(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._worker.answer(request)
        except Exception as error:  # rank 0 reports it
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}

    def _wait(self, key: str) -> None:
        """Waits as long as it takes: rank 0 may be computing a reference."""
        self._session.where.enter("bench: waiting")
        while True:
            try:
                self._store.wait([key], timedelta(seconds=60))
                return
            except RuntimeError:
                continue


def packed(answer: Mapping[str, Any]) -> bytes:
    """An answer as bytes: JSON, with its arrays beside it. Nothing in it can run code."""
    arrays: list[np.ndarray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {"array": len(arrays) - 1}
        if isinstance(value, Mapping):
            return {key: plain(entry) for key, entry in value.items()}
        return value

    text = json.dumps(plain(answer))
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, text=np.array(text))
    return buffer.getvalue()


def unpacked(data: bytes | Sequence[int]) -> dict[str, Any]:
    """`packed` undone."""
    with np.load(io.BytesIO(bytes(data)), allow_pickle=False) as file:
        arrays = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
        content = json.loads(str(file["text"]))

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"array"}:
                return arrays[value["array"]]
            return {key: whole(entry) for key, entry in value.items()}
        return value

    return whole(content)
