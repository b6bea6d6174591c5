"""Fits figures and effects to rows: one linear Gaussian model in logarithms, robust to outliers.

The logarithm of a prediction is linear in the logarithms of figures near those of the prior's and
the shipped fit's middle; effects are linear by nature. Both are drawn to their prior, which data
sheets give, and rows that disagree by more than `OUTLIER` deviations count less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ringattn.benchmarks.simulator.attention import Prices
from ringattn.benchmarks.simulator.effects import effects_of, noise_of
from ringattn.benchmarks.simulator.figures import Figures, prior
from ringattn.benchmarks.simulator.memory_parts import limit_bytes
from ringattn.benchmarks.simulator.predict import (
    SPEEDS,
    Calibration,
    depends_on,
    is_possible,
    is_time,
    raw,
)
from ringattn.benchmarks.simulator.records import Published
from ringattn.errors import UserError

OUTLIER, ROUNDS, NUDGE = 1.5, 8, 0.1
MARGIN, IGNORED = 0.03, 1e-6
"""Of memory between a verdict and the limit; weight of a verdict that is kept to."""
SUSPECT = 10.0
"""How many times less a row counts whose note calls it suspect."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Rows as a linear model around a point.

    Attributes:
        rows: that can be predicted. names: of the figures. at: where, logarithms.
        error: log(predicted / published) of speed there. slope: (rows, figures).
        noise: of the rows, standard deviations.
        effects: names. spreads: their prior deviations. weights: (rows, effects), each times
            the effect's prior deviation.
    """

    rows: tuple[Published, ...]
    names: tuple[str, ...]
    at: np.ndarray
    error: np.ndarray
    slope: np.ndarray
    noise: np.ndarray
    effects: tuple[str, ...]
    spreads: np.ndarray
    weights: np.ndarray


def fits(row: Published) -> bool:
    """Whether a row is one that fits use: a speed, a time, a peak of memory, or a verdict."""
    if row.kind == "verdict":
        return row.value is not None and row.shape is not None and is_possible(row)
    return row.kind in (*SPEEDS, "memory") and row.value is not None and row.value > 0


def with_verdicts(rows: Sequence[Published]) -> list[Published]:
    """The rows, and a verdict that it fits for each training step that was timed."""
    timed = [row for row in rows if row.kind in ("tokens", "flops", "mfu", "seconds")]
    ran = [replace(row, kind="verdict", value=0.0) for row in timed if row.shape and row.value]
    return [*rows, *ran]


def _error(row: Published, value: float, figures: Figures) -> float:
    """Logarithm of predicted over published, of speeds, bytes, and bytes over a verdict's limit."""
    if row.kind == "verdict":
        return float(np.log(value / limit_bytes(row, figures)))
    sign = -1.0 if is_time(row) else 1.0
    return sign * float(np.log(value / float(row.value or 1)))


def linearise(rows: Sequence[Published], figures: Figures) -> Linear:
    """The model of all rows that fits use, around given figures."""
    known: dict = {}
    base = Prices(figures, known)
    kept, errors = [], []
    for row in rows:
        if not fits(row):
            continue
        try:
            value = raw(row, base).value
        except UserError:
            continue
        kept.append(row)
        errors.append(_error(row, value, figures))
    needed = [depends_on(row) for row in kept]
    names = list(dict.fromkeys(name for mine in needed for name in mine))
    slope = np.zeros((len(kept), len(names)))
    for column, name in enumerate(names):
        prices = Prices(figures.nudged(name, 1 + NUDGE), known)
        for index, row in enumerate(kept):
            if name in needed[index]:
                value = _error(row, raw(row, prices).value, figures)
                slope[index, column] = (value - errors[index]) / np.log1p(NUDGE)
    shared = [effects_of(row) for row in kept]
    spreads = {name: spread for own in shared for name, (_, spread) in own.items()}
    place = {name: index for index, name in enumerate(spreads)}
    weights = np.zeros((len(kept), len(spreads)))
    for index, own in enumerate(shared):
        for name, (weight, spread) in own.items():
            weights[index, place[name]] = weight * spread
    return Linear(
        rows=tuple(kept),
        names=tuple(names),
        at=np.log([figures[name] for name in names]),
        error=np.array(errors),
        slope=slope,
        noise=np.array([noise_of(row) * (SUSPECT if row.says("suspect") else 1) for row in kept]),
        effects=tuple(spreads),
        spreads=np.array(list(spreads.values())),
        weights=weights,
    )


def solve(model: Linear, use: np.ndarray) -> Calibration:
    """The most likely figures and effects given some of the rows.

    Args:
        model: of all rows. use: indices of the rows that are known.
    """
    start = np.array([prior(name) for name in model.names])
    centre, spread = np.log(start[:, 0]), start[:, 1]
    # Unknowns in units of their prior deviations: figures from the prior, effects from zero.
    design = np.hstack([model.slope * spread, model.weights])[use]
    offset = (model.error + model.slope @ (centre - model.at))[use]
    noise = model.noise[use]
    gram = design @ design.T
    count = np.ones(len(use))
    # Verdicts pull only where they are violated: over the limit, or under it.
    verdict = np.array(
        [
            0.0 if row.kind != "verdict" else 1.0 if row.value else -1.0
            for row in (model.rows[i] for i in use)
        ]
    )
    offset = offset - MARGIN * verdict
    free = verdict != 0
    count = np.where(free, IGNORED, count)
    dual = np.zeros(len(use))
    for _ in range(ROUNDS):
        dual = np.linalg.solve(gram + np.diag(noise**2 / count), -offset)
        left = (offset + gram @ dual) / noise
        count = np.minimum(1.0, OUTLIER / np.maximum(np.abs(left), 1e-9))
        kept_to = free & (left * verdict >= 0)
        count = np.where(kept_to, IGNORED, count)
    point = design.T @ dual
    figures = np.exp(centre + spread * point[: len(model.names)])
    effects = model.spreads * point[len(model.names) :]
    return Calibration(
        Figures(dict(zip(model.names, figures.tolist(), strict=True))),
        dict(zip(model.effects, effects.tolist(), strict=True)),
    )


def folds_of(
    rows: Sequence[Published], count: int, seed: int = 0, *, by: str = "run"
) -> np.ndarray:
    """A fold for each row; rows of one run share a fold, or all methods of one setting."""

    def key(row: Published) -> tuple:
        return row.run if by == "run" else row.setting

    runs = sorted({key(row) for row in rows}, key=repr)
    order = np.random.default_rng(seed).permutation(len(runs))
    fold = {runs[int(r)]: int(i) % count for i, r in enumerate(order)}
    return np.array([fold[key(row)] for row in rows])
