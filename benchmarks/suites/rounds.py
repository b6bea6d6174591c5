"""Measures entrants side by side on one problem at one number of ranks, and records them.

Each entrant is prepared, run once and held against the reference; a wrong one is not timed. Then
all take turns, round by round, who begins moving on by one, until every median is sure or the
rounds are used up. Within a round the baseline runs too, our kernel on the whole mask in one
process, a copy on every rank: CPU times are compared with it, so that what a busy machine does to
both, and ranks to each other, cancels.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.suites.cells import BASELINE, DIRECTIONS, OURS, Entrant, Problem
from ringattn.benchmarks.suites.judge import Judge
from ringattn.benchmarks.suites.marker import marked
from ringattn.benchmarks.suites.ranks import AskedRanks, RanksError
from ringattn.benchmarks.suites.settings import Common, Settings

UNIT = "TFLOP/s"
PASSES = ("forward", "backward")


@dataclass
class Outcome:
    """What is known of an entrant at one number of ranks.

    Attributes:
        status, reason: as in records. lives: of its ranks when it was prepared.
        checked: every rank's first answer. errors: relative, by result.
        times, baseline: of each round, every rank's seconds, and those of its copy of the baseline.
    """

    entrant: Entrant
    status: str = "ok"
    reason: str = ""
    lives: int = 0
    checked: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    times: list[list[dict[str, Any]]] = field(default_factory=list)
    baseline: list[list[dict[str, Any]]] = field(default_factory=list)

    def stop(self, status: str, reason: str) -> None:
        """Takes the entrant out, with the reason."""
        self.status, self.reason = status, reason

    def seconds(self, kind: str, direction: str) -> np.ndarray:
        """(rounds, ranks) seconds, as `_seconds`."""
        return _seconds(self.times, kind, direction)


class Unit:
    """One problem at one number of ranks.

    Args:
        suite: its name in records, such as "methods". settings: of the run.
        ranks: who computes. recorder: where records go. extra: more for the config of records.
    """

    def __init__(
        self,
        suite: str,
        settings: Settings,
        ranks: AskedRanks,
        recorder: Recorder,
        problem: Problem,
        world: int,
        entrants: Sequence[Entrant],
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.suite, self.settings, self.ranks, self.recorder = suite, settings, ranks, recorder
        self.problem, self.world, self.extra = problem, world, dict(extra or {})
        self.entrants = [e for e in entrants if not self._done(e)]

    @property
    def common(self) -> Common:
        """Settings that suites share."""
        return self.settings.common

    def _case(self, entrant: Entrant, direction: str) -> str:
        who = f"{OURS}-{entrant.key}" if entrant.contender == OURS else entrant.contender
        words = [self.problem.name, who, f"r{self.world}", direction, self.ranks.device]
        return "-".join([*self.extra.values(), *words])

    def _done(self, entrant: Entrant) -> bool:
        name = f"bench.{self.suite}"
        return all(self.recorder.has(name, self._case(entrant, d)) for d in DIRECTIONS)

    def measure(self, judge: Judge, show: Callable[[str], None]) -> list[Outcome]:
        """Checks, times and records every entrant that has no record yet.

        Raises RanksError when nothing more can be asked, after what is known is recorded.
        """
        found: list[Outcome] = []
        try:
            for entrant in self.entrants:
                outcome = Outcome(entrant)
                found.append(outcome)
                self._prepare(outcome, judge, show)
            self._rounds(found, show)
        except RanksError as error:
            for outcome in found:
                if outcome.status == "ok" and not outcome.times:
                    outcome.stop("error", str(error))
            raise
        finally:
            for outcome in found:
                self._record(outcome)
            self._forget()
        return found

    def give_up(self, reason: str) -> None:
        """Records that nothing can be measured."""
        for entrant in self.entrants:
            outcome = Outcome(entrant)
            outcome.stop("error", _about(reason))
            self._record(outcome)

    def _ask(self, world: int, **request: Any) -> list[dict[str, Any]]:
        return self.ranks.ask(world, request)

    def _marked(self, outcome: Outcome) -> AbstractContextManager[None]:
        """Remembers the entrant in case that a launcher's job dies of it."""
        cases = {self._case(outcome.entrant, d): self._config(outcome, d) for d in DIRECTIONS}
        launched = self.ranks.worlds is not None
        return marked(self.recorder, launched, f"bench.{self.suite}", UNIT, cases)

    def _request(self, entrant: Entrant, sample: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "do": "prepare", "problem": asdict(self.problem), "entrant": asdict(entrant),
            "sample": sample,
        }  # fmt: skip

    def _prepare(self, outcome: Outcome, judge: Judge, show: Callable[[str], None]) -> None:
        show(f"{self.problem.mask} on {self.world}: {outcome.entrant.key}")
        try:
            with self._marked(outcome):
                answers = self.ranks.ask(self.world, self._request(outcome.entrant, judge.sample))
        except RanksError as error:
            outcome.stop("error", _about(str(error)))
            if error.fatal:
                raise
            return
        outcome.lives = self.ranks.lives(self.world)
        if "refused" in answers[0]:
            outcome.stop("refused", answers[0]["refused"])
            return
        outcome.checked = answers
        outcome.errors = judge.errors([answer["results"] for answer in answers])
        for answer in answers:
            answer.pop("results")
        reason = judge.wrong(outcome.errors) or _wire_gap(answers)
        if reason:
            outcome.stop("error", reason)

    def _rounds(self, found: Sequence[Outcome], show: Callable[[str], None]) -> None:
        """Timed rounds; the first `warm_up` are not counted."""
        for number in range(-self.common.warm_up, self.common.most):
            enough = number >= self.common.least
            running = [o for o in found if o.status == "ok" and not (enough and self._sure(o))]
            if not running:
                break
            if self.common.most > 1:
                show(f"{self.problem.mask} on {self.world}: round {number + 1}")
            base = self._time_baseline()
            shift = number % max(1, len(running))
            for outcome in running[shift:] + running[:shift]:
                self._time(outcome, base, counted=number >= 0)

    def _time_baseline(self) -> list[dict[str, Any]] | None:
        """Seconds of every rank's copy; None where there is none, as on GPUs."""
        if self.ranks.device != "cpu":
            return None
        try:
            if self._base_lives != self.ranks.lives(self.world):
                request = self._request(BASELINE, _NOTHING)
                if "refused" in self.ranks.ask(self.world, request)[0]:
                    return None
                self._base_lives = self.ranks.lives(self.world)
            return self._ask(self.world, do="time", key=BASELINE.key, flush=self.common.flush)
        except RanksError as error:
            if error.fatal:
                raise
            return None

    _base_lives = -1

    def _time(self, outcome: Outcome, base: list[dict[str, Any]] | None, counted: bool) -> None:
        key = outcome.entrant.key
        try:
            if outcome.lives != self.ranks.lives(self.world):
                # Its ranks died of somebody else.
                self.ranks.ask(self.world, self._request(outcome.entrant, _NOTHING))
                outcome.lives = self.ranks.lives(self.world)
            with self._marked(outcome):
                times = self._ask(self.world, do="time", key=key, flush=self.common.flush)
        except RanksError as error:
            outcome.stop("error", _about(str(error)))
            if error.fatal:
                raise
            return
        if counted:
            outcome.times.append(times)
            if base is not None:
                outcome.baseline.append(base)

    def _sure(self, outcome: Outcome) -> bool:
        """Whether the median of the whole pass is known well enough: CPU ratio, else time."""
        values = _ratios(outcome, "both")
        if values is None:
            values = outcome.seconds("wall", "both").max(1)
        return half_interval(values) <= self.common.precision

    def _forget(self) -> None:
        self._base_lives = -1
        if self.ranks.lives(self.world):
            # Ranks that are started again hold nothing; lost ones are told by the next ask.
            with suppress(RanksError):
                self._ask(self.world, do="forget")

    def _record(self, outcome: Outcome) -> None:
        name = f"bench.{self.suite}"
        for direction in DIRECTIONS:
            case, config = self._case(outcome.entrant, direction), self._config(outcome, direction)
            if self.recorder.has(name, case):
                continue
            if outcome.status == "ok":
                figures, value, spread = self._figures(outcome, direction)
                self.recorder.ok(
                    name, case, value, UNIT, spread=spread, config=config, figures=figures
                )
            else:
                record = getattr(self.recorder, outcome.status)
                record(name, case, UNIT, outcome.reason, config)

    def _config(self, outcome: Outcome, direction: str) -> dict[str, Any]:
        entrant, checked = outcome.entrant, outcome.checked
        first = checked[0] if checked else {}
        words = [f"--masks {self.problem.mask}", f"--ranks {self.world}"]
        if self.suite == "methods" and entrant.method:
            words.append(f"--methods {entrant.method}")
        command = self.settings.command(self.suite, *words)
        return self.problem.config() | {
            "suite": self.suite,
            "contender": entrant.contender,
            "method": entrant.method,
            "chosen_method": first.get("method", ""),
            "layout": first.get("layout") or entrant.layout,
            "how": first.get("note", ""),
            "ranks": self.world,
            "ranks_per_node": entrant.ranks_per_node or self.world,
            "direction": direction,
            "kernel": "auto",
            "device": self.ranks.device,
            "simulated": False,
            "rounds": len(outcome.times),
            "command": command,
            **self.extra,
        }

    def _figures(
        self, outcome: Outcome, direction: str
    ) -> tuple[dict[str, float | None], float, float]:
        """(figures, TFLOP/s per rank on the slowest rank, half its interquartile range)."""
        flops, area = self.problem.flops(direction), self.problem.area
        slowest = outcome.seconds("wall", direction).max(1)
        rates = flops / self.world / slowest / 1e12
        cpu = outcome.seconds("cpu", direction).max(1)
        spread = float(np.subtract(*np.percentile(rates, [75, 25]))) / 2
        names = PASSES if direction == "both" else (direction,)
        figures: dict[str, float | None] = {
            "seconds": float(np.median(slowest)),
            "cpu_seconds": float(np.median(cpu)),
            "tflops": float(np.median(rates)),
            "area": float(area),
            "peak_bytes": float(max(c["peak"][n] for c in outcome.checked for n in names)),
            "wire_bytes": _received(outcome.checked, names),
            "exposed_share": _exposed(outcome, direction),
        }
        if routed := max((c["received"] or {}).get("routing", 0) for c in outcome.checked):
            figures["routing_bytes"] = float(routed)
        ratios = _ratios(outcome, direction)
        if ratios is not None:
            figures["cpu_ratio"] = float(np.median(ratios))
            figures["cpu_ratio_spread"] = float(np.subtract(*np.percentile(ratios, [75, 25]))) / 2
        wanted = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
        for name in (n for part in names for n in wanted[part]):
            if name in outcome.errors:
                figures[f"error_{name}"] = outcome.errors[name]
        return figures, float(np.median(rates)), spread


_NOTHING = {"rows": [], "keys": [], "key_head": 0, "heads": [0, 1]}


def _ratios(outcome: Outcome, direction: str) -> np.ndarray | None:
    """CPU time of the busiest rank over that of the busiest copy in the same round."""
    if not outcome.baseline or len(outcome.baseline) != len(outcome.times):
        return None
    busiest, copy = (
        _seconds(rounds, "cpu", direction).max(1) for rounds in (outcome.times, outcome.baseline)
    )
    return busiest / copy


def _seconds(rounds: Sequence[Sequence[dict[str, Any]]], kind: str, direction: str) -> np.ndarray:
    """(rounds, ranks) seconds: "wall", "cpu" or "kernels"; both passes are added up."""
    names = PASSES if direction == "both" else (direction,)
    return np.array(
        [[sum(rank[n][kind] or 0.0 for n in names) for rank in ranks] for ranks in rounds]
    ).reshape(len(rounds), -1)


def half_interval(values: np.ndarray) -> float:
    """Half of the 95 % interval of a median over the median, from order statistics; inf below 6
    values."""
    count = len(values)
    if count < 6:
        return float("inf")
    reach = 0.98 * np.sqrt(count)
    low, high = max(0, int(count / 2 - reach)), min(count - 1, int(np.ceil(count / 2 + reach)))
    ordered = np.sort(values)
    return float((ordered[high] - ordered[low]) / 2 / np.median(values))


def _received(checked: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    if any(c["received"] is None for c in checked):
        return None
    return float(max(sum(c["received"][n] for n in names) for c in checked))


def _exposed(outcome: Outcome, direction: str) -> float | None:
    """Share of the slowest rank's time that is not kernels; the median over rounds."""
    names = PASSES if direction == "both" else (direction,)
    if any(rank[n]["kernels"] is None for ranks in outcome.times for rank in ranks for n in names):
        return None
    wall, kernels = outcome.seconds("wall", direction), outcome.seconds("kernels", direction)
    slowest = wall.argmax(1)[:, None]
    share = 1 - np.take_along_axis(kernels, slowest, 1) / np.take_along_axis(wall, slowest, 1)
    return float(np.median(share))


def _wire_gap(answers: Sequence[Mapping[str, Any]]) -> str:
    """What the plan counts beside what was on the wire, where they differ; "" otherwise."""
    for rank, answer in enumerate(answers):
        if answer["planned"] is None or answer["received"] is None:
            continue
        for name in PASSES:
            planned, received = answer["planned"][name], answer["received"][name]
            if planned != received:
                return (
                    f"{name} on rank {rank}: the plan counts {planned} bytes, the wire {received}"
                )
    return ""


def _about(text: str) -> str:
    """An error's line; of one about memory its first words say so."""
    lower = text.lower()
    memory = "out of memory" in lower or "can't allocate memory" in lower or "memoryerror" in lower
    return f"out of memory: {text}" if memory else text
