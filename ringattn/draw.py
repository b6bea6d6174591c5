"""Pictures of a plan as PNG files: its mask by owner, its work, its steps.

matplotlib is imported inside the functions, so that planning never pays for it, and only its Agg
canvas is used: no display, no global figure. Nothing here communicates.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.raster import cell_areas, cell_edges, owned_tokens
from ringattn.schedule import Direction, Schedule
from ringattn.step_picture import paint_steps, steps_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ringattn.plan import Plan

MOST_CELLS = 320
DPI = 110
# Okabe and Ito's colours, which people with colour-blindness tell apart, without the pale yellow.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#4D4D4D")
_FAINTEST = 0.45  # shade of a cell that allows almost nothing: it must still be seen


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of width × height inches on an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_mask(mask: Mask, layout: Layout, path: str | Path) -> None:
    """Writes the mask as a picture, coloured by the rank that owns the query row.

    Args:
        mask: any mask; sequences beyond 320 tokens are shown by the exact area of each cell, and
            the mean over the heads where heads differ.
        layout: over the same tokens.
        path: of the PNG file.
    """
    figure = new_figure(7.2, 6.2)
    paint_mask(figure.add_subplot(), mask, layout)
    figure.savefig(path)


def draw_work(plan: "Plan", path: str | Path) -> None:
    """Writes the mask area that each rank computes in each step, forward and backward.

    Args:
        plan: any plan, of real or simulated ranks.
        path: of the PNG file.
    """
    schedules = (plan.forward, plan.backward)
    steps = max(max(s.nsteps, 1) for s in schedules)
    figure = new_figure(min(4.6 + 0.75 * steps, 12), 2 * min(1.4 + 0.32 * plan.world, 4.6))
    grid = figure.add_gridspec(2, 2, width_ratios=(max(min(steps, 12), 3), 3))
    for row, schedule in enumerate(schedules):
        axes = figure.add_subplot(grid[row, 0])
        paint_work(axes, schedule)
        paint_totals(figure.add_subplot(grid[row, 1], sharey=axes), schedule)
    figure.suptitle(f"work of {plan.method} over {plan.layout.name}, {_described(plan.mask)}")
    figure.savefig(path)


def draw_steps(
    plan: "Plan",
    path: str | Path,
    direction: Direction = "forward",
    steps: tuple[int, int] | None = None,
) -> None:
    """Writes what every rank does in every step: its tasks, and the moves as arrows.

    Args:
        plan: any plan, of real or simulated ranks.
        path: of the PNG file.
        direction: "forward" or "backward".
        steps: first step and one past the last; all by default.

    Raises:
        UserError: more ranks or steps than fit a legible picture.
    """
    schedule = plan.schedule(direction)
    shown = range(*(steps or (0, schedule.nsteps)))
    figure = new_figure(*steps_size(schedule, shown))
    axes = figure.add_subplot()
    paint_steps(axes, schedule, shown)
    axes.set_title(
        f"{direction} of {plan.method} over {plan.layout.name}, {_described(plan.mask)}", pad=22
    )
    figure.savefig(path)


def paint_mask(axes: "Axes", mask: Mask, layout: Layout) -> None:
    """Draws the mask on given axes; see `draw_mask`.

    A cell's hue is that of the owners of its query rows, mixed by their tokens; its shade is the
    share of allowed pairs, which starts from a visible minimum.
    """
    edges = cell_edges(mask.seq_len, MOST_CELLS)
    tokens = np.diff(edges)
    density = cell_areas(mask, edges) / (mask.layers * np.outer(tokens, tokens))
    hue = owned_tokens(layout, edges) / tokens[:, None] @ rank_colors(layout.world)
    shade = np.where(density > 0, _FAINTEST + (1 - _FAINTEST) * density, 0)[..., None]
    image = 1 - shade * (1 - hue[:, None, :])
    axes.imshow(image, extent=(0, mask.seq_len, mask.seq_len, 0), interpolation="nearest")
    if mask.seq_len <= 64:
        axes.set_xticks(np.arange(mask.seq_len), minor=True)
        axes.set_yticks(np.arange(mask.seq_len), minor=True)
        axes.grid(which="both", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    axes.set_xlabel("key position j (tokens)")
    axes.set_ylabel("query position i (tokens)")
    _thousands(axes)
    axes.set_title(f"{_described(mask)}\n{layout.name} over {layout.world} ranks", fontsize=10)
    _rank_legend(axes, layout.world)


def paint_work(axes: "Axes", schedule: Schedule) -> None:
    """Draws the mask area per rank and step as a heat map on given axes."""
    work = schedule.work
    scale, unit = pair_unit(int(work.max(initial=0)))
    image = axes.imshow(work / scale, cmap="cividis", vmin=0, aspect="auto")
    axes.figure.colorbar(image, ax=axes)
    if work.size <= 96:
        for (rank, step), value in np.ndenumerate(work):
            light = value > 0.55 * work.max(initial=0)
            axes.text(
                step, rank, f"{value / scale:.3g}", ha="center", va="center", fontsize=8,
                color="black" if light else "white",
            )  # fmt: skip
    _whole_numbers(axes.xaxis)
    _whole_numbers(axes.yaxis)
    axes.set_xlabel("plan step")
    axes.set_ylabel("rank")
    axes.set_title(f"{schedule.direction} work: {unit}", fontsize=10)


def paint_totals(axes: "Axes", schedule: Schedule) -> None:
    """Draws the mask area of each rank in one direction, with the mean, on given axes."""
    total = schedule.work.sum(axis=1)
    scale, unit = pair_unit(int(total.max(initial=0)))
    axes.barh(np.arange(schedule.world), total / scale, color=PALETTE[0])
    axes.axvline(total.mean() / scale, color=PALETTE[5], linestyle="--")
    busiest = total.max() / total.mean() if total.any() else 1.0
    axes.set_title(f"busiest rank {busiest:.2f} × mean (dashed)", fontsize=10)
    axes.set_xlabel(unit)
    axes.tick_params(labelleft=False)


def rank_colors(world: int) -> np.ndarray:
    """One RGB colour per rank, (P, 3) in [0, 1]: distinct up to seven ranks, then a scale."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if world <= len(PALETTE):
        return np.array([to_rgb(color) for color in PALETTE[:world]])
    return colormaps["viridis"](np.linspace(0, 0.95, world))[:, :3]


def pair_unit(largest: int) -> tuple[float, str]:
    """What to divide mask areas by, and the name of the unit."""
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * power:
            return power, f"{prefix}pairs (query, key)"
    return 1.0, "pairs (query, key)"


def _described(mask: Mask) -> str:
    share = 100 * mask.area / max(mask.layers * mask.seq_len**2, 1)
    return f"{mask.name} mask of {mask.seq_len:,} tokens ({share:.3g} % of all pairs)"


def _rank_legend(axes: "Axes", world: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    colors: Any = rank_colors(world)
    if world <= len(PALETTE):
        handles = [Patch(color=c, label=f"rank {r}") for r, c in enumerate(colors)]
        axes.legend(
            handles=handles, title="owner of row i", fontsize=8, frameon=False,
            loc="upper left", bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
        return
    scale = ScalarMappable(Normalize(-0.5, world - 0.5), ListedColormap(colors))
    axes.figure.colorbar(scale, ax=axes, label="rank that owns row i", shrink=0.8)


def _thousands(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 4, 8, 10], integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=16, integer=True))
