"""What failing ranks tell each other, through the job's key-value store.

ringattn/beat/RANK     `Beat`, written again and again while the rank lives
ringattn/first         rank and exit code of the failure that is reported
ringattn/stack/RANK    the rank's stacks after it has seen that one
ringattn/reported      the report is out: everybody may go
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

_FIRST, _REPORTED = "ringattn/first", "ringattn/reported"
_POLL_S = 0.05


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        count: of this rank's beats. done: the last one; the rank has finished in order.
        host, pid: where the rank runs. at: what it does, see `Whereabouts`.
    """

    count: int
    host: str
    pid: int
    at: str
    done: bool = False


@dataclass(frozen=True)
class First:
    """The failure of a job that is reported: whose, and its exit code."""

    rank: int
    code: int


class FailureBoard:
    """One connection to the store; for one thread. Every call raises RuntimeError when the store
    is gone, or waits for ever when the network drops its packets.

    Args:
        store: of the job; it is cloned.
        rank, world: of this process.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        # The stubs of torch do not know this method.
        self._store: dist.Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._rank, self._world = rank, world

    def beat(self, beat: Beat) -> None:
        """Shows that this rank lives."""
        self._store.set(f"ringattn/beat/{self._rank}", json.dumps(asdict(beat)))

    def beat_of(self, rank: int) -> Beat | None:
        """Another rank's newest sign of life; None before its first."""
        key = f"ringattn/beat/{rank}"
        if not self._store.check([key]):
            return None
        return Beat(**json.loads(self._store.get(key)))

    def claim(self, mine: First) -> First:
        """Asks to be the one that reports; returns who does."""
        text = json.dumps(asdict(mine))
        return First(**json.loads(self._store.compare_set(_FIRST, "", text)))

    def first(self) -> First | None:
        """Who reports a failure; None while there is none."""
        return First(**json.loads(self._store.get(_FIRST))) if self._store.check([_FIRST]) else None

    def add_stack(self, text: str) -> None:
        """Hands in this rank's stacks."""
        self._store.set(f"ringattn/stack/{self._rank}", text)

    def collect_stacks(self, seconds: float) -> dict[int, str]:
        """Stacks of the other ranks, as many as come in time."""
        keys = {r: f"ringattn/stack/{r}" for r in range(self._world) if r != self._rank}
        _wait_until(lambda: self._store.check(list(keys.values())), time.monotonic() + seconds)
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        texts = self._store.multi_get([keys[rank] for rank in there]) if there else []
        return {rank: text.decode() for rank, text in zip(there, texts, strict=True)}

    def set_reported(self) -> None:
        """Lets the other ranks go."""
        self._store.set(_REPORTED, "1")

    def wait_reported(self, seconds: float) -> bool:
        """Waits until the report is out, at most so long; returns whether it is."""
        return _wait_until(lambda: self._store.check([_REPORTED]), time.monotonic() + seconds)

    def wait_done(self, seconds: float) -> None:
        """Waits until every other rank has finished in order, at most so long."""
        end = time.monotonic() + seconds
        for rank in range(self._world):
            if rank != self._rank:
                _wait_until(lambda of=rank: self._is_done(of), end)

    def _is_done(self, rank: int) -> bool:
        beat = self.beat_of(rank)
        return beat is not None and beat.done


def _wait_until(reached: Callable[[], bool], end: float) -> bool:
    """Polls until a time of `time.monotonic`; returns whether it was reached."""
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True
