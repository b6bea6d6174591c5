"""Reads and writes a fit: `configs/calibration/fitted.yaml`, figures and effects by name."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ringattn.benchmarks.simulator.figures import Figures, prior
from ringattn.benchmarks.simulator.predict import Calibration
from ringattn.errors import UserError

SMALLEST = 0.002
"""Effects below are left out of the file."""


def load_calibration(path: str | Path | None = None) -> Calibration:
    """The fit of a file; None for the one that comes with the package.

    Raises:
        UserError: no such file, or not a mapping of figures and effects to numbers.
    """
    source = resources.files("ringattn.configs") / "calibration" / "fitted.yaml"
    try:
        text = source.read_text("utf-8") if path is None else Path(path).read_text("utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"calibration {path}", f"cannot be read ({problem})", "fit anew") from None
    figures, effects = _numbers(content, "figures"), _numbers(content, "effects")
    for name in figures:
        try:
            prior(name)
        except (KeyError, ValueError):
            raise UserError(f"figure {name!r}", "is unknown", "fit anew") from None
    return Calibration(Figures(figures), effects)


def _numbers(content: Any, key: str) -> dict[str, float]:
    part = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(part, Mapping) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in part.values()
    ):
        raise UserError(f"calibration key {key!r}", "must map names to numbers", "fit anew")
    return {str(name): float(value) for name, value in part.items()}


def dump_calibration(found: Calibration, source: str) -> str:
    """The fit as YAML text; `source` says what was fitted to."""
    figures = {n: float(f"{v:.4g}") for n, v in sorted(found.figures.values.items())}
    effects = {n: round(v, 4) for n, v in sorted(found.effects.items()) if abs(v) >= SMALLEST}
    head = (
        f"# Written by `python -m ringattn.benchmarks.fit_simulator`: {source}.\n"
        "# figures: of clusters and steps. effects: logarithms of factors on speed, or on memory.\n"
    )
    return head + yaml.safe_dump(
        {"figures": figures, "effects": effects}, sort_keys=True, width=200
    )
