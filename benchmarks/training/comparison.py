"""Contenders on one case: they train in turn, are held against each other and recorded."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.training.case import RankReport, TrainCase
from ringattn.benchmarks.training.contenders import Contender
from ringattn.benchmarks.training.figures import (
    Reference,
    describe,
    loss_difference,
    reference_of,
    step_figures,
    step_flops,
)
from ringattn.benchmarks.training.groups import Group, GroupError
from ringattn.benchmarks.training.peak import PeakRate
from ringattn.benchmarks.training.rank import train_rank
from ringattn.errors import UserError
from ringattn.launch.config_check import check_config

UNIT = "tokens/s"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One case, and where its records go.

    Attributes:
        case: what is trained.
        name: of the records. prefix: of their cases; the contender's name follows.
        device: "cpu" or "cuda".
        peak: what MFU is a share of, where it is known.
        tolerance: largest relative difference of losses.
        timeout: seconds, see `Group`.
        command: that measures this again.
        recorder: of the records. show: is told what is being done, and what came of it.
    """

    case: TrainCase
    name: str
    prefix: str
    device: str
    peak: PeakRate | None
    tolerance: float
    timeout: float
    command: str
    recorder: Recorder
    show: Progress

    def run(self, contenders: Sequence[Contender]) -> None:
        """Trains these, one step of each at a time, and records what came of them."""
        with ExitStack() as stack:
            started = [(one, self._start(one, stack)) for one in contenders]
            running = [(one, group) for one, group in started if group is not None]
            rounds = 0
            while running:
                going = []
                for contender, group in running:
                    group.go()
                    if self._hear(contender, group):
                        going.append((contender, group))
                running = going
                rounds += 1
                if running:
                    self.show(f"{self.prefix}: step {rounds} of {len(running)} contenders done")

    def _start(self, contender: Contender, stack: ExitStack) -> Group | None:
        """The contender's ranks, waiting for their first step; None where that is not to be."""
        self.show(f"{self.prefix}: starting {contender.name}")
        try:
            self._check(contender)
        except UserError as error:
            self._fail(contender, str(error), refused=True)
            return None
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringattn-train-"))
        arguments = (train_rank, contender, self.case, folder)
        group = Group(contender.world(self.case), *arguments, timeout=self.timeout)
        stack.enter_context(group)
        return group if self._hear(contender, group) else None

    def _check(self, contender: Contender) -> None:
        """Raises UserError where a contender cannot train the case."""
        config, world = contender.config(self.case), contender.world(self.case)
        check_config(config)
        reason = contender.refusal(self.case, self.case.shape(config))
        if reason is not None:
            raise UserError(contender.name, reason, "leave it out of train.contenders")
        gpus = torch.cuda.device_count()
        if self.device == "cuda" and gpus < world:
            raise UserError(f"{world} ranks", f"there are {gpus} GPUs", "lower train.ranks")

    def _hear(self, contender: Contender, group: Group) -> bool:
        """Waits for a group; whether it goes on. Records its end."""
        try:
            reports = group.hear()
        except GroupError as error:
            if error.details:
                self.show.note(error.details)
            self._fail(contender, str(error), refused=error.refused)
            return False
        if reports is None:
            return True
        self._judge(contender, reports)
        return False

    def _judge(self, contender: Contender, reports: list[RankReport]) -> None:
        """Holds losses against the reference, and records figures or that they are wrong."""
        about, losses = self._about(contender), reports[0].losses
        reference = reference_of(self.recorder.path, self.name, about["group"])
        reference = reference or Reference(contender.name, losses)
        difference = loss_difference(losses, reference.losses)
        about |= {
            "losses": losses,
            "reference": reference.contender,
            "tolerance": self.tolerance,
            "peak_source": self.peak and self.peak.source,
        }
        if not difference <= self.tolerance:
            reason = (
                f"wrong losses: they differ from those of {reference.contender} by "
                f"{difference:.1e}, more than {self.tolerance:g}; no figures"
            )
            self._fail(contender, reason, refused=False, about=about)
            return
        flops = step_flops(self.case, contender.config(self.case))
        found = step_figures(self.case, reports, flops, self.peak)
        case = f"{self.prefix}-{contender.name}"
        figures = found.figures | {"loss_difference": difference}
        self.recorder.ok(
            self.name,
            case,
            found.rate,
            UNIT,
            spread=found.spread,
            config=about,
            figures=figures,
        )
        self._tell(f"{case}: {found.line()}, losses within {difference:.0e}")

    def _fail(
        self,
        contender: Contender,
        reason: str,
        *,
        refused: bool,
        about: dict[str, Any] | None = None,
    ) -> None:
        case = f"{self.prefix}-{contender.name}"
        record = self.recorder.refused if refused else self.recorder.error
        record(self.name, case, UNIT, reason, about or self._about(contender))
        self._tell(f"{case}: {'refused' if refused else 'error'}: {reason}")

    def _tell(self, line: str) -> None:
        self.show.advance()
        self.show.note(line)

    def _about(self, contender: Contender) -> dict[str, Any]:
        about = describe(self.case, contender.name, self.command, self.device)
        config = contender.config(self.case)
        return about | {
            "processes": contender.world(self.case),
            "threads_per_rank": config.train.threads_per_rank,
            "parallel": {"cp": config.parallel.cp, "dp": config.parallel.dp},
            "overrides": dict(contender.overrides),
        }
