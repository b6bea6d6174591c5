"""The picture of a schedule's steps: one row per rank, tasks as boxes, moves as arrows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ringattn.errors import UserError
from ringattn.schedule import Channel, Lane, Op, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANKS, MOST_STEPS = 16, 12
_COLORS = {
    Channel.Q: "#0072B2",
    Channel.K: "#D55E00",
    Channel.O: "#009E73",
    Channel.DQ: "#56B4E9",
    Channel.DKV: "#AA3377",
}
_STYLES = {Lane.INTRA: "solid", Lane.INTER: (0, (4, 2))}
_LEFT, _WIDTH, _HEIGHT = 0.13, 0.74, 0.30  # of a box within its step (x) and its row (y)
_LINES = 3  # landings named below a box


@dataclass(frozen=True)
class Arrow:
    """The moves that share post, land, ends, channel, op and lane."""

    post: int
    land: int
    src: int
    dst: int
    channel: Channel
    op: Op
    lane: Lane
    rows: int
    bytes: int


def arrows_of(schedule: Schedule) -> list[Arrow]:
    """A schedule's moves, one arrow for those that a reader cannot tell apart."""
    names = ("post", "land", "src", "dst", "channel", "op", "lane")
    keys = np.stack([schedule.moves[name] for name in names], axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    totals = np.zeros((len(unique), 2), dtype=np.int64)
    values = np.stack([schedule.moves["rows"], schedule.move_bytes], axis=1)
    np.add.at(totals, inverse.reshape(-1), values)
    arrows = []
    for key, (rows, size) in zip(unique.tolist(), totals.tolist(), strict=True):
        post, land, src, dst, channel, op, lane = key
        arrows.append(Arrow(post, land, src, dst, Channel(channel), Op(op), Lane(lane), rows, size))
    return arrows


def steps_size(schedule: Schedule, shown: range) -> tuple[float, float]:
    """Inches (width, height) of a legible picture of these steps.

    Raises:
        UserError: too many ranks or steps.
    """
    if schedule.world > MOST_RANKS:
        raise UserError(
            f"steps of {schedule.world} ranks",
            f"at most {MOST_RANKS} ranks are legible",
            "use draw_work, or a plan over fewer ranks",
        )
    if len(shown) > MOST_STEPS or shown.start < 0 or shown.stop > schedule.nsteps:
        raise UserError(
            f"steps={shown.start, shown.stop}",
            f"must be at most {MOST_STEPS} steps of the plan's {schedule.nsteps}",
            f"pass e.g. steps=(0, {min(MOST_STEPS, schedule.nsteps)})",
        )
    return max(6.5, 1.2 + 2.7 * max(len(shown), 1)), 1.7 + 1.25 * schedule.world


def paint_steps(axes: "Axes", schedule: Schedule, shown: range) -> None:
    """Draws these steps on given axes.

    A box is the work of a rank in a step, filled in proportion to the largest one. An arrow leaves
    the source at the left edge of the step that posts it and arrives at the right edge of the step
    in which it lands; below each box stands what lands there.
    """
    arrows = [a for a in arrows_of(schedule) if a.post in shown or a.land in shown]
    tiles = np.zeros_like(schedule.work)
    np.add.at(tiles, (schedule.tasks["rank"], schedule.tasks["step"]), 1)
    largest = max(int(schedule.work.max(initial=0)), 1)
    for step in shown:
        for rank in range(schedule.world):
            area = int(schedule.work[rank, step])
            _paint_box(axes, rank, step, area, int(tiles[rank, step]), area / largest)
            landing = [a for a in arrows if a.land == step and a.dst == rank]
            _paint_landings(axes, rank, step, landing)
    for arrow in arrows:
        _paint_arrow(axes, arrow)
    _frame(axes, schedule.world, shown)
    _legend(axes, arrows)


def _paint_box(axes: "Axes", rank: int, step: int, area: int, tiles: int, share: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (step + _LEFT, rank - _HEIGHT / 2)
    idle = tiles == 0
    axes.add_patch(
        Rectangle(
            corner, _WIDTH, _HEIGHT, facecolor="white", edgecolor="0.6" if idle else "0.2",
            linestyle=":" if idle else "-", zorder=3,
        )
    )  # fmt: skip
    if not idle:
        axes.add_patch(Rectangle(corner, _WIDTH * share, _HEIGHT, facecolor="#B9CFE4", zorder=4))
    text = "no tasks" if idle else f"{area:,} pairs, {tiles} tile{'s' * (tiles > 1)}"
    color = "0.5" if idle else "black"
    place = (step + 0.5, rank)
    axes.text(*place, text, ha="center", va="center", fontsize=8.5, color=color, zorder=6)


def _paint_landings(axes: "Axes", rank: int, step: int, landing: list[Arrow]) -> None:
    shown = landing if len(landing) <= _LINES else landing[: _LINES - 1]
    lines = [(_described(arrow), _COLORS[arrow.channel]) for arrow in shown]
    if len(shown) < len(landing):
        rest = landing[len(shown) :]
        lines.append((f"and {len(rest)} more, {sum(a.bytes for a in rest):,} B", "0.3"))
    for number, (text, color) in enumerate(lines):
        axes.text(
            step + 0.5, rank + 0.255 + 0.165 * number, text, ha="center", va="center",
            fontsize=7.5, color=color, zorder=7,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
        )  # fmt: skip


def _described(arrow: Arrow) -> str:
    verb = "=" if arrow.op == Op.SET else "+="
    rows = f"{arrow.rows} row{'s' * (arrow.rows > 1)}"
    if arrow.src == arrow.dst:
        return f"{arrow.channel.name} {verb} copy of {rows}"
    return f"{arrow.channel.name} {verb} {rows} from rank {arrow.src}, {arrow.bytes:,} B"


def _paint_arrow(axes: "Axes", arrow: Arrow) -> None:
    axes.annotate(
        "",
        xy=(arrow.land + 0.96, arrow.dst + (0.06 if arrow.src > arrow.dst else -0.06)),
        xytext=(arrow.post + 0.05, arrow.src),
        arrowprops={
            "arrowstyle": "-|>",
            "color": _COLORS[arrow.channel],
            "linestyle": _STYLES[arrow.lane],
            "linewidth": 1.4,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=2,
    )


def _frame(axes: "Axes", world: int, shown: range) -> None:
    axes.set_xlim(shown.start, max(shown.stop, shown.start + 1))
    axes.set_ylim(world - 0.35, -0.4)
    axes.set_yticks(range(world), [f"rank {rank}" for rank in range(world)])
    axes.set_xticks([step + 0.5 for step in shown], [f"step {step}" for step in shown])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for step in shown[1:]:
        axes.axvline(step, color="0.75", linewidth=0.8, zorder=1)
    axes.set_xlabel(
        "plan step: moves start at its left edge, tasks run, moves land at its right edge"
    )
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color("0.75")


def _legend(axes: "Axes", arrows: list[Arrow]) -> None:
    from matplotlib.lines import Line2D

    names = {Channel.K: "K: key and value rows", Channel.DKV: "DKV: their gradients"}
    handles = [
        Line2D([], [], color=_COLORS[c], linewidth=1.4, label=names.get(c, c.name))
        for c in sorted({a.channel for a in arrows})
    ]
    handles += [
        Line2D([], [], color="0.3", linestyle=_STYLES[lane], label=f"{lane.name.lower()} lane")
        for lane in sorted({a.lane for a in arrows})
    ]
    if handles:
        axes.figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8,
            frameon=False,
        )  # fmt: skip
