"""Where the ranks of an examination put their results: the job's key-value store.

Results do not travel over the links that are examined: a rank that is silent, or a pair that hangs,
is then known by name to all others.
"""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ringattn.errors import CommunicationError

GRACE_S = 10.0


class SilentRanksError(RuntimeError):
    """Ranks did not answer in time. Raised on every rank that still answers.

    Attributes:
        step: what they were at. ranks: who.
    """

    def __init__(self, step: str, ranks: list[int]) -> None:
        super().__init__(f"rank(s) {', '.join(map(str, ranks))} did not answer in step {step}")
        self.step, self.ranks = step, ranks


@dataclass(frozen=True)
class Board:
    """Results of all ranks, step by step. Every rank calls `share` with the same steps in order.

    Args:
        store: shared by the ranks; its keys below "ringattn/doctor" are free.
        rank, world: this rank's place.
        timeout: seconds that a step may take. grace: seconds that a rank may be late for reasons
            of its own before it counts as silent.
    """

    store: dist.Store
    rank: int
    world: int
    timeout: float
    grace: float = GRACE_S

    @classmethod
    def open(cls, rank: int, world: int, timeout: float, grace: float = GRACE_S) -> "Board":
        """The board of one examination, on the store of the default group; every rank calls it."""
        store = dist.distributed_c10d._get_default_store()
        # Several examinations of one job find separate keys: each rank counts its own.
        number = store.add(f"ringattn/doctor/opened {rank}", 1)
        return cls(
            dist.PrefixStore(f"ringattn/doctor/{number}", store), rank, world, timeout, grace
        )

    def leave(self) -> None:
        """Ends the examination: returns on rank 0 at once, on others when rank 0 has called it."""
        if self.rank == 0:
            self.store.set("left", "1")
            return
        try:
            self.store.wait(["left"], timedelta(seconds=self.timeout + self.grace))
        except RuntimeError as error:
            raise CommunicationError("rank 0 did not answer at the end") from error

    def share(self, step: str, value: Any) -> list[Any]:
        """The values that all ranks give in a step, by rank; each is what JSON holds.

        Rank 0 collects and tells the others.

        Raises:
            SilentRanksError: ranks did not answer in time, on every rank that did.
            CommunicationError: rank 0 or the store did not answer.
        """
        self.store.set(f"{step}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            found = self._collect(step)
            self.store.set(step, json.dumps(found))
        else:
            # Rank 0 may itself be late by a timeout, and then wait for others.
            try:
                self.store.wait([step], timedelta(seconds=2 * (self.timeout + self.grace)))
            except RuntimeError as error:
                raise CommunicationError(f"rank 0 did not answer in step {step}") from error
            found = json.loads(self.store.get(step))
        if found["silent"]:
            raise SilentRanksError(step, found["silent"])
        return found["values"]

    def _collect(self, step: str) -> dict[str, list[Any]]:
        """Values of all ranks, and which of them are missing after the time is up."""
        deadline = time.monotonic() + self.timeout + self.grace
        values, silent = [], []
        for rank in range(self.world):
            key = f"{step}/{rank}"
            left = max(0.1, deadline - time.monotonic())
            try:
                self.store.wait([key], timedelta(seconds=left))
            except RuntimeError:
                silent.append(rank)
                values.append(None)
                continue
            values.append(json.loads(self.store.get(key)))
            self.store.delete_key(key)
        return {"values": values, "silent": silent}
