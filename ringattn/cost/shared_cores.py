"""Plays a schedule on ranks that share the CPU cores of their nodes.

A rank has two threads: its own, which packs, computes and lands, and one that carries its messages.
Threads that have something to do share the cores of their node evenly, none faster than a core. A
message begins once both ends have posted it, after the link's latency, and takes CPU time at both
ends; each end carries its messages in turn. Between nodes it also takes the wire's time.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ringattn.cost.cluster import Cluster, OnCores
from ringattn.cost.messages import Messages, message_seconds
from ringattn.cost.survey import Survey
from ringattn.schedule import Lane

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Played:
    """Begin and end of compute (steps, P), end of each rank (P,), begin and end of each message;
    and CPU seconds of each rank's messages (P,)."""

    times: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    carrying: np.ndarray


def play(
    counts: Survey,
    cluster: Cluster,
    costs: OnCores,
    work: np.ndarray,
    pack: np.ndarray,
    unpack: np.ndarray,
) -> Played:
    """Plays a surveyed schedule.

    Args:
        work, pack, unpack: CPU seconds of a rank's own thread in each step: kernels, what comes
            before them and after them, (steps, P).
    """
    player = _Player(counts, cluster, costs, np.stack([pack, work, unpack]))
    player.run()
    carry = player.carry
    carrying = np.bincount(counts.messages.src, carry, counts.world)
    carrying += np.bincount(counts.messages.dst, carry, counts.world)
    return Played((player.begin, player.end, player.finish, player.sent, player.done), carrying)


@dataclass(eq=False)
class _Thread:
    """A thread: CPU seconds left of what it does, and for carriers (message) what waits."""

    left: float = 0.0
    busy: bool = False
    message: int = -1
    queue: deque[int] = field(default_factory=deque)


class _Player:
    """Time moves from one change of what runs to the next."""

    def __init__(self, counts: Survey, cluster: Cluster, costs: OnCores, work: np.ndarray) -> None:
        steps, world = work.shape[1:]
        m = counts.messages
        count = len(m.src)
        self.steps, self.world, self.work, self.messages = steps, world, work, m
        self.carry = m.nbytes / (1e9 * costs.carry_gbs) + 1e-6 * costs.carry_us
        inter = m.lane == Lane.INTER
        self.latency = 1e-6 * np.where(inter, cluster.inter.latency_us, cluster.intra.latency_us)
        self.wire = np.where(inter, message_seconds(m, cluster, world), 0.0)
        self.cores, self.node = costs.cores, [r // cluster.ranks_per_node for r in range(world)]
        self.begin, self.end = np.zeros((steps, world)), np.zeros((steps, world))
        self.finish, self.sent, self.done = np.zeros(world), np.zeros(count), np.zeros(count)
        self.posting, self.landing = _by_step(m, m.post), _by_step(m, m.land)
        self.posted, self.carried = [0] * count, [0] * count
        self.missing = {key: len(mine) for key, mine in self.landing.items()}
        self.timers: list[
            tuple[float, int]
        ] = []  # (when, message): latency, then the wire, is over
        self.threads = [_Thread() for _ in range(2 * world)]
        self.phase, self.now = [(0, 0)] * world, 0.0

    def run(self) -> None:
        """Plays until every rank is done."""
        for rank in range(self.world):
            self._enter(rank, 0, 0)
        while True:
            busy = [t for t, thread in enumerate(self.threads) if thread.busy]
            if not busy and not self.timers:
                return
            speed = self._speeds(busy)
            ahead = [self.threads[t].left / speed[t] for t in busy]
            ahead += [when - self.now for when, _ in self.timers]
            passed = max(min(ahead), 0.0)
            self.now += passed
            over = [item for item in self.timers if item[0] <= self.now + _TINY]
            self.timers = [item for item in self.timers if item[0] > self.now + _TINY]
            for t in busy:
                self.threads[t].left -= speed[t] * passed
            for _, message in over:
                self._tick(message)
            for t in busy:
                if self.threads[t].busy and self.threads[t].left <= _TINY:
                    self._finished(t)

    def _speeds(self, busy: list[int]) -> dict[int, float]:
        on = [self.node[t % self.world] for t in busy]
        return {t: min(1.0, self.cores / on.count(node)) for t, node in zip(busy, on, strict=True)}

    def _enter(self, rank: int, step: int, part: int) -> None:
        """A rank's own thread begins a part of a step: 0 before kernels, 1 kernels, 2 after."""
        self.phase[rank] = (step, part)
        thread = self.threads[rank]
        thread.busy, thread.left = True, float(self.work[part, step, rank])
        if part == 1:
            self.begin[step, rank] = self.now

    def _finished(self, thread: int) -> None:
        self.threads[thread].busy = False
        if thread >= self.world:
            self._end_carried(thread)
            return
        step, part = self.phase[thread]
        if part == 0:
            for message in self.posting.get((step, thread), ()):
                self._post(message)
            self._enter(thread, step, 1)
        elif part == 1:
            self.end[step, thread] = self.now
            self.phase[thread] = (step, 2)
            self._land(thread, step)
        elif step + 1 < self.steps:
            self._enter(thread, step + 1, 0)
        else:
            self.finish[thread] = self.now

    def _land(self, rank: int, step: int) -> None:
        """Goes on once nothing that ends here is missing."""
        waits = self.phase[rank] == (step, 2) and not self.threads[rank].busy
        if waits and not self.missing.get((step, rank), 0):
            self._enter(rank, step, 2)

    def _post(self, message: int) -> None:
        self.posted[message] += 1
        if self.posted[message] == 2:
            self.timers.append((self.now + float(self.latency[message]), message))

    def _tick(self, message: int) -> None:
        """Latency is over and both ends may carry; or the wire is done after them."""
        if self.carried[message] == 2:
            self._arrive(message)
            return
        self.sent[message] = self.now
        for rank in (self.messages.src[message], self.messages.dst[message]):
            thread = self.threads[self.world + int(rank)]
            thread.queue.append(message)
            self._carry_next(thread)

    def _carry_next(self, thread: _Thread) -> None:
        if not thread.busy and thread.queue:
            thread.message = thread.queue.popleft()
            thread.busy, thread.left = True, float(self.carry[thread.message])

    def _end_carried(self, index: int) -> None:
        thread = self.threads[index]
        message = thread.message
        self.carried[message] += 1
        if self.carried[message] == 2:
            wire = self.sent[message] + float(self.wire[message])
            if wire > self.now:
                self.timers.append((wire, message))
            else:
                self._arrive(message)
        self._carry_next(thread)

    def _arrive(self, message: int) -> None:
        m = self.messages
        self.done[message] = self.now
        step = int(m.land[message])
        for rank in (int(m.src[message]), int(m.dst[message])):
            self.missing[step, rank] -= 1
            self._land(rank, step)


def _by_step(messages: Messages, steps: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Messages by (step, rank) of both of their ranks."""
    found: dict[tuple[int, int], list[int]] = {}
    for ranks in (messages.src, messages.dst):
        for index, (step, rank) in enumerate(zip(steps.tolist(), ranks.tolist(), strict=True)):
            found.setdefault((step, rank), []).append(index)
    return found
