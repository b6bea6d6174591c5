"""What a run does about steps that go wrong: bad numbers, unreadable records, slow ranks."""

import math
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.events import EventLog
from ringattn.launch.guard import Guard, Verdict
from ringattn.launch.metrics import StepMetrics
from ringattn.launch.straggler import Stragglers
from ringattn.parallel.lines import gather_lines


class StepFaults:
    """Judges steps and writes down what went wrong. Every rank makes one; that communicates.

    Args:
        config: the run.
        world: all ranks. rank: this one; rank 0 writes for all.
        note: shows a line to the person; called on rank 0.

    Attributes:
        guard: what it judges by.
    """

    def __init__(
        self, config: Config, world: dist.ProcessGroup, rank: int, note: Callable[[str], None]
    ) -> None:
        self.guard = Guard(config.faults)
        self._world, self._rank, self._note = world, rank, note
        self._stragglers = Stragglers(config.faults)
        self._log = EventLog(Path(config.run.dir))
        self._hosts = gather_lines(socket.gethostname(), world)

    def leave_out(
        self, step: int, error: UserError | None, position: int, *, rate: float, began: float
    ) -> StepMetrics:
        """Settles a step that some rank could not read. Every rank calls it, in place of the step.

        Args:
            step: its number, from 1.
            error: why this rank could not read it; None where it could.
            position: tokens of the stream up to its end.
            rate: learning rate that it would have had.
            began: `time.perf_counter` at its begin.

        Returns:
            The line of metrics.jsonl: nothing was read.

        Raises:
            As `settle`.
        """
        own = "" if error is None else f"{error.what}: {error.rule}"
        if error is not None:
            self._log.write("data error", step, own, rank=self._rank)
        message = next(filter(None, gather_lines(own, self._world)))
        verdict = self.guard.judge_data(step, message)
        self.settle(verdict, step, math.nan, position)
        return StepMetrics(
            step=step,
            loss=math.nan,
            tokens=0,
            step_s=time.perf_counter() - began,
            tokens_per_s=0.0,
            grad_norm=math.nan,
            lr=rate,
            mfu=None,
            fault=verdict.fault,
        )

    def settle(self, verdict: Verdict, step: int, loss: float, position: int) -> None:
        """As `Guard.settle`, by which it also raises; shows the line about a skipped step."""
        main = self._rank == 0
        line = self.guard.settle(verdict, step, loss, position, self._log if main else None)
        if line is not None and main:
            self._note(line)

    def name_stragglers(self, step: int, seconds: Sequence[float]) -> None:
        """Shows and writes down which ranks have been slow for a while; see `Stragglers`."""
        for slow in self._stragglers.update(seconds):
            if self._rank == 0:
                host = self._hosts[slow.rank]
                self._note(f"warning: step {step}: {slow.line(host)}")
                self._log.write("straggler", step, slow.line(host), rank=slow.rank, host=host)
