"""Predicts a published row in its own unit, with the parts that the figure is made of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ringattn.benchmarks.simulator.attention import Prices, attention_of, figures_of
from ringattn.benchmarks.simulator.effects import MEMORY, effects_of
from ringattn.benchmarks.simulator.figures import DIRECTIONS, Figures, defaults
from ringattn.benchmarks.simulator.memory_parts import (
    limit_bytes,
    longest_length,
    memory_parts,
)
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.step_parts import is_forward_only, step_parts
from ringattn.benchmarks.simulator.tables import entry_for
from ringattn.benchmarks.simulator.values import is_timed
from ringattn.errors import UserError

SPEEDS = ("attention", "tokens", "seconds", "flops", "mfu")
"""Kinds of figures that are speeds or times."""
BRIEF = 4096
"""Tokens of a call on one GPU that says nothing about a sustained rate."""
IMPOSSIBLE = 2.0
"""Of a verdict on a method that cannot run: as far over the limit as nobody doubts."""


@dataclass(frozen=True)
class Prediction:
    """A figure in the row's unit in SI, and its parts.

    Attributes:
        value: predicted. parts: seconds or bytes by name. factor: of speed, by the row's effects.
    """

    value: float
    parts: Mapping[str, float]
    factor: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """What a fit knows: figures and effects.

    Attributes:
        figures: of clusters, kernels and steps. effects: logarithms of factors on speed, by name.
    """

    figures: Figures
    effects: Mapping[str, float] = field(default_factory=dict)

    def factor(self, row: Published) -> float:
        """The row's effects together, a factor on its speed."""
        known = self.effects
        return math.exp(sum(known.get(n, 0.0) * w for n, (w, _) in effects_of(row).items()))


def raw_speed(row: Published, prices: Prices) -> Prediction:
    """A speed or time by the model alone, without effects.

    Raises:
        UserError: the row lacks what a prediction needs; the message says what.
    """
    _check_length(row)
    if row.kind == "attention":
        seconds, tflops = prices.seconds(row, attention_of(row), row.directions)
        parts = {"attention": seconds}
        if is_time(row):
            return Prediction(seconds, parts)
        return Prediction(tflops if "flop" in row.unit.lower() else 1 / seconds, parts)
    step = step_parts(row, prices)
    value = {
        "tokens": step.tokens / step.total * (1 if per_gpu(row) else row.gpus),
        "seconds": step.total,
        "flops": step.flops / (1e12 * step.total),
        "mfu": step.flops / (1e12 * step.total * step.peak_tflops),
    }[row.kind]
    return Prediction(value, step.seconds)


def _check_length(row: Published) -> None:
    if row.seq_len >= 1:
        return
    if "seq_len" in row.impossible:
        rule = f"cannot be {row.impossible['seq_len']!r}"
        raise UserError("seq_len", rule, "state tokens, at most 2**40")
    raise UserError("seq_len", "is missing", "state the length")


def is_time(row: Published) -> bool:
    """Whether more is slower."""
    if row.kind == "attention":
        return is_timed(row.metric, row.unit)
    return row.kind == "seconds"


def per_gpu(row: Published) -> bool:
    """Whether a rate of tokens is of one GPU."""
    return "gpu" in row.unit.lower() or "gpu" in row.metric or "rank" in row.metric


def raw(row: Published, prices: Prices) -> Prediction:
    """A figure of any kind by the model alone: a speed, a time, or the bytes that it follows from.

    Raises:
        UserError: the row cannot be predicted; the message says why.
    """
    if row.kind in SPEEDS:
        return raw_speed(row, prices)
    if row.kind not in MEMORY:
        raise UserError(f"metric {row.metric!r}", "is unknown", "state a speed, time or memory")
    _check_length(row)
    found = memory_parts(row, prices.figures)
    return Prediction(found.total, found.parts)


def predict(row: Published, calibration: Calibration, prices: Prices) -> Prediction:
    """The row's figure with its effects; for verdicts the bytes over the limit.

    Raises:
        UserError: the row cannot be predicted; the message says why.
    """
    if row.kind in SPEEDS:
        return speed(row, calibration, prices)
    found, factor = raw(row, prices), calibration.factor(row)
    if row.kind == "memory":
        return Prediction(found.value * factor, found.parts, factor)
    if row.kind == "length":
        return Prediction(longest_length(row, prices.figures, factor), found.parts, factor)
    over = found.value * factor / limit_bytes(row, prices.figures)
    if not is_possible(row):
        over = max(over, IMPOSSIBLE)
    return Prediction(over, found.parts, factor)


def is_possible(row: Published) -> bool:
    """Whether a row's heads can be shared by as many ranks as its method asks for."""
    heads_only = entry_for("methods", row.method)["plan"] == "ulysses"
    return not heads_only or row.cp <= row.heads[0]


def speed(row: Published, calibration: Calibration, prices: Prices) -> Prediction:
    """A speed or time with the row's effects."""
    raw = raw_speed(row, prices)
    factor = calibration.factor(row)
    return Prediction(raw.value / factor if is_time(row) else raw.value * factor, raw.parts, factor)


def depends_on(row: Published) -> list[str]:
    """Names of the figures that fits change and that a row's prediction depends on."""
    free = defaults()["fitted"]
    if row.kind in MEMORY:
        return [f"step/{key}" for key in free["memory"]]
    forward_only = row.kind != "attention" and is_forward_only(row)
    directions = row.directions or (DIRECTIONS[:1] if forward_only else DIRECTIONS)
    found = [n for n in figures_of(row, directions) if n.partition("/")[2] in free["links"]
             or n.rpartition(".")[2] in free["curves"]]  # fmt: skip
    if row.kind == "attention":
        # Calls on few tokens are too short for a GPU to fall to the clock that it sustains.
        brief = row.gpus == 1 and row.seq_len <= BRIEF
        return [n for n in found if not (brief and n.endswith(".tflops"))]
    return found + [f"step/{key}" for key in free["steps"]]
