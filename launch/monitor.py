"""Watches over a rank from threads of its own, so that no failure makes a job hang.

A rank shows signs of life through the job's store, watches those of the next rank, and looks out
for the failure of any. Whoever fails, or finds that another is gone, asks to be the one that
reports; the others hand in their Python stacks and end. A rank that reaches nobody any more, or
whose main thread stands still, ends by itself. Nothing here needs the main thread, which may be
stuck in a collective.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ringattn.launch.events import EventLog
from ringattn.launch.failure import (
    EXIT_FAULT,
    Failure,
    end_process,
    print_failure,
    report_text,
)
from ringattn.launch.failure_board import Beat, FailureBoard, First
from ringattn.launch.failure_report import compose_report, name_rank, write_report
from ringattn.launch.ranks import Ranks
from ringattn.launch.stacks import own_stacks
from ringattn.launch.whereabouts import Whereabouts

_STACKS_S = 3.0  # the reporter waits so long for the stacks of others
_GRACE_S = 6.0  # a failing rank ends so long after its failure, whatever does not answer
_LONGEST_INTERVAL_S = 2.0
_MARGIN_S = 2.0  # a collective that times out tells more than the watch can


class Monitor:
    """The watch over one rank; a context manager around the rank's work.

    Every rank of the job has one. They communicate through the store alone.

    Args:
        ranks: this rank's place.
        store: of the job.
        timeout_s: silence, or standstill, of so many seconds is a failure.
        where: what this rank does; its main thread keeps it up to date.
        run_dir: reports of faults are kept there, if it exists.
        keeper: the rank whose process holds the store; None for a process of the launcher.
    """

    def __init__(
        self,
        ranks: Ranks,
        store: dist.Store,
        timeout_s: float,
        where: Whereabouts,
        run_dir: Path,
        keeper: int | None = None,
    ) -> None:
        self._rank, self._world, self._store = ranks.rank, ranks.world, store
        self._timeout, self._where, self._run_dir = timeout_s, where, run_dir
        self._host, self._beats = socket.gethostname(), 0
        self._interval = min(max(timeout_s / 20, 0.1), _LONGEST_INTERVAL_S)
        self._reached = time.monotonic()  # when the store last answered
        self._claimed = False  # whether it did once more after this rank's failure
        self._keeper = keeper
        self._keeper_beat: Beat | None = None
        self._failure: Failure | None = None
        self._failed = float("inf")  # when
        self._trace = ""  # of the main thread's failure, once it has one
        self._code = EXIT_FAULT
        self._lock, self._printed = threading.Lock(), False
        self._finished, self._settled = threading.Event(), threading.Event()

    def __enter__(self) -> "Monitor":
        if self._world > 1:
            _start(self._talk, "talk")
            _start(self._watch, "watch")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """After work in order: says so. Rank 0, which may hold the store, waits for the others."""
        if self._world == 1 or kind is not None:
            return
        try:
            board = self._board()
            board.beat(self._beat(done=True))
            if self._rank == 0:
                board.wait_done(self._timeout)
        except RuntimeError:
            pass  # the rank that holds the store was faster
        self._finished.set()

    def report(self, failure: Failure) -> int:
        """Reports a failure of the main thread, unless another rank's is reported already.

        Returns:
            The exit code of this process, which should end at once.
        """
        if self._world == 1:
            if self._where.step and not failure.quiet:
                failure = replace(failure, line=f"{self._where}: {failure.line}")
            return print_failure(failure)
        self._fail(failure)
        self._settled.wait()
        return self._code

    def _talk(self) -> None:
        """The thread that speaks with the store; a dead network may hold it up for ever."""
        neighbour = (self._rank + 1) % self._world
        heard, since = None, time.monotonic()
        board: FailureBoard | None = None
        while not self._finished.wait(self._interval) and self._failure is None:
            try:
                board = board or self._board()
                board.beat(self._beat())
                first, beat = board.first(), board.beat_of(neighbour)
                if self._keeper is not None:
                    self._keeper_beat = board.beat_of(self._keeper)
            except RuntimeError:
                continue  # `_watch` ends a rank that reaches nobody for too long
            self._reached = now = time.monotonic()
            if first is not None:
                self._end("")
            elif beat != heard or (beat is not None and beat.done):
                heard, since = beat, now
            elif now - since > self._timeout + _MARGIN_S:
                self._end(_silence(neighbour, beat, self._timeout))

    def _watch(self) -> None:
        """The thread that needs nobody: ends what stands still or takes too long."""
        ticks, since = -1, time.monotonic()
        while not self._finished.wait(min(self._interval, 0.5)):
            now = time.monotonic()
            if not self._where.watched or self._where.ticks != ticks:
                ticks, since = self._where.ticks, now
            if now - self._failed > _GRACE_S:
                self._print({}, self._lost_keeper())
                end_process(self._code)
            elif now - since > self._timeout + _MARGIN_S:
                self._end(f"no progress for {self._timeout:g} s")
            elif now - self._reached > self._timeout + _MARGIN_S:
                self._end(
                    f"the job's store has not answered for {self._timeout:g} s: the link to its "
                    "host is cut, or that host is gone"
                )

    def _end(self, line: str) -> None:
        """Fails while the main thread goes on: settles it, then ends the process.

        An empty line follows another rank's failure.
        """

        def leave() -> None:
            self._settled.wait()
            end_process(self._code)

        if self._fail(Failure(EXIT_FAULT, line)):
            _start(leave, "leave")

    def _fail(self, failure: Failure) -> bool:
        """Begins to settle this process's first failure; False for a later one."""
        with self._lock:
            self._trace = self._trace or failure.trace.rstrip()
            if self._failure is not None:
                return False
            self._failure, self._code, self._failed = failure, failure.code, time.monotonic()
        _start(self._settle, "settle")
        return True

    def _settle(self) -> None:
        """Reports this rank's failure, or leaves it to the rank that was first."""
        failure = self._failure
        assert failure is not None
        try:
            board = self._board()
            first = board.claim(First(self._rank, failure.code))
            self._claimed = True
            if first.rank != self._rank:
                self._code = first.code
                board.add_stack(self._trace or own_stacks())
                if not board.wait_reported(_STACKS_S + _LONGEST_INTERVAL_S):
                    self._print({}, {first.rank: board.beat_of(first.rank)})
            else:
                if failure.quiet:
                    self._print({}, {})
                stacks = board.collect_stacks(_STACKS_S)
                missing = set(range(self._world)) - set(stacks) - {self._rank}
                self._print(stacks, {rank: board.beat_of(rank) for rank in sorted(missing)})
                board.set_reported()
        except RuntimeError:
            self._print({}, self._lost_keeper())
        self._settled.set()

    def _lost_keeper(self) -> dict[int, Beat | None]:
        """The rank that holds the store, where the store is gone; nobody else can be asked."""
        if self._keeper in (None, self._rank) or self._claimed:
            return {}
        return {self._keeper: self._keeper_beat}

    def _print(self, stacks: dict[int, str], silent: dict[int, Beat | None]) -> None:
        """Prints the report, once; nothing where another rank's failure is followed."""
        failure = self._failure
        with self._lock:
            if failure is None or self._printed or not failure.line:
                return
            self._printed = True
        if failure.quiet:
            print_failure(failure)
            return
        stacks = {**stacks, self._rank: self._trace or own_stacks()}
        text = compose_report(failure.line, self._rank, self._beat(), stacks, silent)
        report_text(text)
        write_report(self._run_dir, self._rank, text)
        EventLog(self._run_dir).write("failure", self._where.step, failure.line, rank=self._rank)

    def _board(self) -> FailureBoard:
        return FailureBoard(self._store, self._rank, self._world)

    def _beat(self, *, done: bool = False) -> Beat:
        self._beats += 1
        return Beat(self._beats, self._host, os.getpid(), str(self._where), done)


def _start(body: Callable[[], None], name: str) -> None:
    threading.Thread(target=body, name=f"ringattn-monitor-{name}", daemon=True).start()


def _silence(rank: int, beat: Beat | None, seconds: float) -> str:
    """The line about a rank that shows no sign of life."""
    who = f"rank {rank}" if beat is None else name_rank(rank, beat)
    return (
        f"{who} has shown no sign of life for {seconds:g} s: it is stopped, or its host or link "
        "is gone"
    )
