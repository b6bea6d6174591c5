"""The predicted timeline of a plan: a picture, and a trace that Perfetto and Chrome open.

matplotlib is imported inside the functions, so that planning never pays for it. Nothing here
communicates.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringattn.cost import Priced
from ringattn.draw import PALETTE, new_figure
from ringattn.schedule import Lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANKS = 16
_COMPUTE = PALETTE[0]
_LANES = {Lane.INTRA: PALETTE[2], Lane.INTER: PALETTE[5]}
_ROWS = ("compute", *(lane.name.lower() for lane in Lane))


def draw_timeline(
    priced: tuple[Priced, Priced], path: str | Path, *, title: str = "predicted timeline"
) -> None:
    """Writes when each rank computes and receives, forward and backward, as a PNG file.

    A rank has up to three rows: compute, and what arrives over each lane. Of more than 16 ranks the
    slowest of each direction and others at even distances are shown.

    Args:
        priced: forward and backward of one plan.
        path: of the PNG file.
        title: printed above.
    """
    ranks = shown_ranks(priced)
    figure = new_figure(13, 1.9 + max(0.34 * len(ranks), 1.4))
    seconds = max(p.seconds for p in priced)
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    widths = [max(p.seconds, 0.4 * seconds) for p in priced] if seconds else [1.0, 1.0]
    grid = figure.add_gridspec(1, 2, width_ratios=widths)
    for column, part in enumerate(priced):
        axes = figure.add_subplot(grid[0, column])
        paint_timeline(axes, part, ranks, scale)
        axes.set_xlabel(f"{unit} from the start of the {part.direction}")
        axes.tick_params(labelleft=column == 0)
        axes.set_title(f"{part.direction}: {scale * part.seconds:.4g} {unit}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    _legend(figure)
    figure.savefig(path)


def shown_ranks(priced: tuple[Priced, Priced]) -> list[int]:
    """Ranks that a picture has room for: all, or the slowest ones and others evenly spread."""
    world = len(priced[0].rank_seconds)
    if world <= MOST_RANKS:
        return list(range(world))
    slowest = {int(np.argmax(p.rank_seconds)) for p in priced}
    spread = np.linspace(0, world - 1, MOST_RANKS - len(slowest)).round().astype(int)
    return sorted(slowest | {int(rank) for rank in spread})


def paint_timeline(axes: "Axes", priced: Priced, ranks: list[int], scale: float) -> None:
    """Draws one direction on given axes, times multiplied by `scale`."""
    height = 0.8 / len(_ROWS)
    for place, rank in enumerate(ranks):
        top = place - 0.4
        spans = np.stack([priced.begin[:, rank], priced.end[:, rank] - priced.begin[:, rank]], 1)
        _bars(axes, spans[spans[:, 1] > 0] * scale, top, height, _COMPUTE)
        for row, (lane, color) in enumerate(_LANES.items(), start=1):
            mine = (priced.dst == rank) & (priced.lane == lane) & (priced.src != rank)
            sent = priced.sent[mine]
            spans = np.stack([sent, priced.done[mine] - sent], axis=1)
            _bars(axes, spans * scale, top + row * height, height, color)
        axes.plot(
            [scale * priced.rank_seconds[rank]] * 2, [top, top + 0.8], color="black", linewidth=1.2
        )
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, 1.01 * scale * priced.seconds or 1)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks], fontsize=8)
    for place in range(1, len(ranks)):
        axes.axhline(place - 0.5, color="0.85", linewidth=0.6, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bars(axes: "Axes", spans: np.ndarray, top: float, height: float, color: str) -> None:
    """Bars of (start, width); their edges keep neighbours apart."""
    if len(spans):
        axes.broken_barh(
            [(start, width) for start, width in spans.tolist()], (top, height), facecolors=color,
            edgecolors="white", linewidth=0.4,
        )  # fmt: skip


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {Lane.INTRA: "receiving inside the node", Lane.INTER: "receiving between nodes"}
    handles: list[Any] = [Patch(color=_COMPUTE, label="computing (one bar per step)")]
    handles += [Patch(color=color, label=names[lane]) for lane, color in _LANES.items()]
    handles.append(Line2D([], [], color="black", linewidth=1.2, label="rank is done"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )


def chrome_trace(priced: tuple[Priced, Priced]) -> dict[str, Any]:
    """Both directions as one Chrome trace, the backward after the forward; for `json.dump`.

    A process per rank, with the rows compute, intra and inter; microseconds.
    """
    world = len(priced[0].rank_seconds)
    events: list[dict[str, Any]] = []
    for rank in range(world):
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        events += [_name("thread_name", rank, row, name) for row, name in enumerate(_ROWS)]
    start = 0.0
    for part in priced:
        for event in part.trace():
            name = f"{part.direction} {event['name']}"
            row = _ROWS.index(event["tid"])
            events.append(event | {"name": name, "tid": row, "ts": event["ts"] + start})
        start += 1e6 * part.seconds
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _name(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}
