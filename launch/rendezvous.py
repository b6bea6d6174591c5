"""The ranks of one life of a job find each other in a store that earlier lives have used.

A launcher that restarts ranks may keep its store, and with it what their predecessors wrote:
addresses of processes that are gone, and who failed first. torchrun of PyTorch 2.13 does, and the
numbers that it gives to restarts need not be the same on all nodes. So every rank says hello under
a name of its own that no predecessor can have used, and rank 0 answers each by that name.
"""

import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from ringattn.errors import CommunicationError

_POLL_S = 0.01


def launcher_holds_store(environ: Mapping[str, str]) -> bool:
    """Whether a process of the launcher holds the store, as torchrun's does; else rank 0 does."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join_life(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of the store that only these ranks use. Every rank calls it; all wait for all.

    Args:
        store: reached by all ranks; whatever it holds already is left alone.
        rank, world: place of this process among the ranks.
        timeout: how long to wait for the others.

    Raises:
        CommunicationError: some rank did not come; names those that rank 0 misses.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        _welcome(store, name, world, deadline)
        return dist.PrefixStore(f"ringattn/{name}", store)
    store.set(f"ringattn/hello/{rank}", name)
    _wait(store, f"ringattn/{name}/welcome", deadline, "rank 0")
    life = store.get(f"ringattn/{name}/welcome").decode()
    store.set(f"ringattn/{life}/here/{rank}", "1")
    _wait(store, f"ringattn/{life}/go", deadline, "all ranks")
    return dist.PrefixStore(f"ringattn/{life}", store)


def _welcome(store: dist.Store, life: str, world: int, deadline: float) -> None:
    """Answers every hello, of the living and of the dead, until all ranks are here."""
    missing, answered = set(range(1, world)), set[str]()
    while missing:
        for rank in sorted(missing):
            if store.check([f"ringattn/{life}/here/{rank}"]):
                missing.remove(rank)
            elif store.check([f"ringattn/hello/{rank}"]):
                name = store.get(f"ringattn/hello/{rank}").decode()
                if name not in answered:
                    answered.add(name)
                    store.set(f"ringattn/{name}/welcome", life)
        if missing:
            names = ", ".join(str(rank) for rank in sorted(missing)[:8])
            _pause(deadline, f"rank {names}" if len(missing) == 1 else f"ranks {names}")
    store.set(f"ringattn/{life}/go", "1")


def _wait(store: dist.Store, key: str, deadline: float, whom: str) -> None:
    while not store.check([key]):
        _pause(deadline, whom)


def _pause(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise CommunicationError(f"no sign of {whom} within run.timeout_s of the start")
    time.sleep(_POLL_S)
