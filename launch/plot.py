"""The loss curve of a run as a PNG."""

import math
from pathlib import Path
from typing import Any

from ringattn.launch.metrics import EVAL_FILE, METRICS_FILE, read_lines


def plot_loss(
    run_dir: Path, title: str, entropy: dict[str, dict[str, float] | None]
) -> Path | None:
    """Draws training and held-out loss over steps into ``loss.png``.

    Args:
        run_dir: folder with the run's metric files.
        title: of the picture.
        entropy: `CorpusMeta.entropy`; drawn as horizontal lines.

    Returns:
        The picture's path; None when no step has been written yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = read_lines(run_dir / METRICS_FILE)
    if not steps:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(*_curve(steps), linewidth=1, label="training")
    if evaluations := read_lines(run_dir / EVAL_FILE):
        axes.plot(*_curve(evaluations), marker="o", markersize=4, label="held out")
    for (name, value), style in zip(sorted(entropy.items()), ("--", ":"), strict=False):
        if value is not None:
            axes.axhline(value["nats"], color="grey", linestyle=style, label=f"{name} entropy")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


def _curve(lines: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    # A null is a loss that was not finite: a gap in the curve.
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]
    return [line["step"] for line in lines], losses
