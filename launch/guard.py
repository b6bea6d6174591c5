"""What becomes of a step that went wrong: updated, skipped, rolled back, or the end of the run.

Every rank judges the same summed numbers by the same rules, so all of them decide alike without
asking each other.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ringattn.errors import UserError
from ringattn.launch.config import FaultsConfig
from ringattn.launch.events import EventLog

Action = Literal["update", "skip", "rollback", "stop"]
Cause = Literal["nonfinite", "spike", "data error"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What to do with a step, and why.

    Attributes:
        action: "update" is that of a good step.
        cause: what is wrong; None for a good step.
        what, rule, fix: of the one line about it, as in `UserError`.
    """

    action: Action
    cause: Cause | None = None
    what: str = ""
    rule: str = ""
    fix: str = ""

    @property
    def good(self) -> bool:
        """Whether weights are to be updated."""
        return self.action == "update"

    @property
    def fault(self) -> str | None:
        """As in metrics.jsonl, such as "nonfinite: skip"; None for a good step."""
        return None if self.good else f"{self.cause}: {self.action}"


class RollBack(Exception):
    """The run is to go on from its newest checkpoint, with the data after the step that failed.

    Attributes:
        step: optimizer steps that were done when the bad step ended, as in metrics.jsonl.
        position: tokens of the stream up to the bad step's end.
    """

    def __init__(self, message: str, *, step: int, position: int) -> None:
        super().__init__(message)
        self.step, self.position = step, position


class Guard:
    """Judges steps by ``faults``; remembers recent good losses and bad steps in a row.

    Losses are judged for spikes once ``faults.spike_window`` good ones are known. No communication.

    Args:
        faults: the rules.
    """

    def __init__(self, faults: FaultsConfig) -> None:
        self._faults = faults
        self._losses: deque[float] = deque(maxlen=faults.spike_window)
        self._in_a_row = 0

    def judge(self, step: int, loss: float, norm: float | None = None) -> Verdict:
        """Judges a step; changes nothing.

        Args:
            step: its number, from 1.
            loss: its mean loss over all ranks.
            norm: its global gradient norm, once that is known.
        """
        for name, words, value in (("loss", "loss", loss), ("grad_norm", "gradient norm", norm)):
            if value is not None and not math.isfinite(value):
                return self._bad(
                    "nonfinite",
                    self._faults.on_nonfinite,
                    f"{name}={value}",
                    f"step {step} must have a finite {words}",
                    "lower train.lr and resume from the last checkpoint",
                )
        mean = self._mean()
        if self._faults.on_spike != "ignore" and loss > self._faults.spike_factor * mean:
            return self._bad(
                "spike",
                self._faults.on_spike,
                f"loss={loss:.4g}",
                f"step {step} must not exceed faults.spike_factor={self._faults.spike_factor:g} "
                f"times {mean:.4g}, the mean of the last {self._faults.spike_window} good steps",
                "lower train.lr or raise faults.spike_factor, and resume from the last checkpoint",
            )
        return Verdict(action="update")

    def judge_data(self, step: int, message: str) -> Verdict:
        """The verdict on a step that a rank cannot read; changes nothing.

        Args:
            step: its number, from 1.
            message: names file and record.
        """
        return self._bad(
            "data error",
            self._faults.on_data_error,
            message,
            f"step {step} cannot be read",
            "repair the corpus and resume from the last checkpoint",
        )

    def settle(
        self, verdict: Verdict, step: int, loss: float, position: int, log: EventLog | None
    ) -> str | None:
        """Remembers a judged step, and writes down a bad one.

        Args:
            verdict: the last one on the step.
            step: its number, from 1.
            loss: its mean loss; that of a step that was not read does not matter.
            position: tokens of the stream up to its end.
            log: None on ranks that write nothing.

        Returns:
            A line about a skipped step; None for a good one.

        Raises:
            RollBack: the run is to go on from its newest checkpoint.
            UserError: the run ends here.
        """
        if verdict.good:
            self._in_a_row = 0
            self._losses.append(loss)
            return None
        self._in_a_row += 1
        message = f"{verdict.what}: {verdict.rule}"
        action = verdict.action
        error = UserError(verdict.what, verdict.rule, verdict.fix)
        if action != "stop" and self._in_a_row >= self._faults.max_in_a_row:
            action = "stop"
            error = UserError(
                f"{self._in_a_row} steps in a row went wrong, the last one with {message}",
                f"faults.max_in_a_row={self._faults.max_in_a_row} ends the run",
                verdict.fix,
            )
        if log is not None:
            assert verdict.cause is not None
            assert action != "update"
            if verdict.cause != "data error":  # the ranks that met it have written it
                log.write(verdict.cause, step, message)
            log.write(action, step, message)
        if action == "stop":
            raise error
        if action == "rollback":
            raise RollBack(message, step=step, position=position)
        return f"step {step} skipped: {message}"

    def state(self) -> list[float]:
        """What a checkpoint keeps, so that a resumed run judges as an undisturbed one would."""
        return [float(self._in_a_row), *self._losses]

    def restore(self, state: Sequence[float]) -> None:
        """Takes over a `state`; an empty one is that of a new run."""
        count, *losses = state or (0.0,)
        self._in_a_row = int(count)
        self._losses.clear()
        self._losses.extend(losses)

    def roll_back(self, state: Sequence[float]) -> None:
        """As `restore`, but goes on counting bad steps: a run does not roll back for ever."""
        count = self._in_a_row
        self.restore(state)
        self._in_a_row = count

    def _mean(self) -> float:
        """Of the recent good losses; infinite until there are enough."""
        if len(self._losses) < self._faults.spike_window:
            return math.inf
        # Exactly rounded, so it does not depend on where the window began.
        return math.fsum(self._losses) / len(self._losses)

    def _bad(
        self,
        cause: Cause,
        policy: Literal["ignore", "stop", "skip", "rollback"],
        what: str,
        rule: str,
        fix: str,
    ) -> Verdict:
        assert policy != "ignore", "what is ignored is not judged"
        return Verdict(action=policy, cause=cause, what=what, rule=rule, fix=fix)
