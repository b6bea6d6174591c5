"""Our trainer itself, as ``ringattn train`` runs it, up to the last step's checkpoint."""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import Any

from ringattn.benchmarks.training.case import TrainCase
from ringattn.benchmarks.training.clock import StepClock
from ringattn.launch.config import Config
from ringattn.launch.job import open_job
from ringattn.launch.metrics import StepMetrics
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.run_log import RunLog
from ringattn.launch.session import Session
from ringattn.launch.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A contender: every sequence is shared by all ranks.

    Attributes:
        name: of the contender.
        overrides: values of the configuration, such as ``parallel.engine``.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def world(self, case: TrainCase) -> int:
        """See `Contender.world`."""
        return case.ranks

    def refusal(self, case: TrainCase, shape: ModelConfig) -> str | None:
        """See `Contender.refusal`."""
        return None

    def config(self, case: TrainCase) -> Config:
        """See `Contender.config`."""
        own = {
            "parallel.cp": case.ranks,
            "train.accumulate": case.packs,
            "checkpoint.resume": "never",
        }
        return case.config(case.ranks, {**own, **self.overrides})

    def train(self, case: TrainCase, config: Config, session: Session, clock: StepClock) -> None:
        """See `Contender.train`."""
        job = open_job(config, session.sharers)
        trainer = Trainer(replace(job, shape=case.shape(config)), session)
        trainer.log = _ClockedLog(config, clock, active=session.is_main)
        try:
            with redirect_stderr(io.StringIO()):  # progress lines
                trainer.fit()
        except _Done:
            return


class _Done(Exception):
    """The last measured step is over: the run ends before it evaluates and saves."""


class _ClockedLog(RunLog):
    """Writes and shows what it always does, then tells the clock."""

    def __init__(self, config: Config, clock: StepClock, *, active: bool) -> None:
        super().__init__(config, active=active)
        self._clock = clock

    def open(self, start: int) -> None:
        super().open(start)
        self._clock.begin()

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        self._clock.tick(metrics.loss)
        if self._clock.done:
            raise _Done
