"""Pictures of ``ringattn evaluate``'s results."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_context(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws each test that a context.json holds; returns the pictures' paths."""
    drawers = {"position": _position, "context": _context, "needles": draw_needles}
    written: list[Path] = []
    for name, draw in drawers.items():
        if name in result:
            figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.add_subplot()
            draw(axes, result[name])
            axes.set_title(f"{result['run']}, step {result['step']}")
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
    return written


def draw_needles(axes: Axes, needles: dict[str, Any]) -> None:
    """Heat map: context length across, depth downwards, share of needles retrieved as colour."""
    lengths, depths = needles["lengths"], needles["depths"]
    columns = [list(row) for row in zip(*needles["retrieved"], strict=True)]
    axes.imshow(columns, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the needle")
    for y, row in enumerate(columns):
        for x, share in enumerate(row):
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)


def _position(axes: Axes, position: dict[str, Any]) -> None:
    rows = zip(position["context"], position["loss"], strict=True)
    points = [(context, loss) for context, loss in rows if loss is not None]
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4)
    _labels(axes, "tokens of context (buckets by powers of two)", "loss (nats per token)")


def _context(axes: Axes, context: dict[str, Any]) -> None:
    axes.plot(context["context"], context["perplexity"], marker="o", markersize=4)
    _labels(axes, "tokens of context", "perplexity of the same tokens")


def _labels(axes: Axes, across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
