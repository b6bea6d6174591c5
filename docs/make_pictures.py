"""Writes docs/img/*.png and prints the tables of the worked example in docs/architecture.md.

    python docs/make_pictures.py           # both
    python docs/make_pictures.py --tables  # the tables only

tests/core/test_draw.py fails when the document shows other tables than this prints.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import ringattn as ra
from ringattn.bands import BAND_FIELDS, OPEN
from ringattn.draw import (
    PALETTE,
    draw_mask,
    draw_steps,
    draw_work,
    new_figure,
    paint_mask,
    pair_unit,
)
from ringattn.schedule import Channel, Lane, Op, Schedule, Wire

IMAGES = Path(__file__).resolve().parent / "img"
DIRECTIONS = ("forward", "backward")
LENGTHS = [21, 4, 7]
RANKS = 4
TASK_COLUMNS = (
    "step", "rank", "qslot", "kslot", "oslot", "gslot",
    "h0", "h1", "q0", "q1", "k0", "k1", "lo", "hi", "area",
)  # fmt: skip
MOVE_COLUMNS = (
    "post", "land", "src", "dst", "channel", "sslot", "s0", "dslot", "d0", "rows",
    "nheads", "op", "take", "dtype", "lane",
)  # fmt: skip
NAMES = {"channel": Channel, "op": Op, "lane": Lane, "dtype": Wire}


def example_plan(method: str) -> ra.Plan:
    """The worked example: three documents, 32 tokens, four ranks on two nodes."""
    context = ra.ContextParallel(
        RANKS,
        heads=(4, 2),
        head_dim=8,
        dtype=torch.bfloat16,
        method=method,
        layout="contiguous",
        ranks_per_node=2,
    )
    return context.plan(ra.masks.documents(LENGTHS, causal=True))


def table(title: str, rows: np.ndarray, columns: tuple[str, ...]) -> str:
    """A table as fixed-width text, as it stands in the document."""
    cells = [list(columns)] + [[_cell(row, name) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [" ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([f"{title}:", *lines])


def _cell(row: np.void, name: str) -> str:
    value = int(row[name])
    if name in NAMES:
        return NAMES[name](value).name
    return "open" if abs(value) >= OPEN else str(value)


def tables() -> Iterator[str]:
    """All tables of the worked example."""
    plan = example_plan("ring")
    yield table("bands of the mask", plan.mask.bands, BAND_FIELDS)
    ranges = plan.layout.ranges
    yield table("ranges of the layout", ranges, ("owner", "start", "stop", "step", "offset"))
    for method in ("ring", "direct"):
        for direction in DIRECTIONS:
            schedule = example_plan(method).schedule(direction)
            yield from _schedule_tables(f"{method} {direction}", schedule)


def _schedule_tables(name: str, schedule: Schedule) -> Iterator[str]:
    backward = schedule.direction == "backward"
    columns = tuple(c for c in TASK_COLUMNS if backward or c != "gslot")
    yield table(f"{name}, tasks", schedule.tasks, columns)
    yield table(f"{name}, moves", schedule.moves, MOVE_COLUMNS)
    slots = ("rank", "channel", "slot", "rows", "heads")
    yield table(f"{name}, slots beyond home", schedule.slots, slots)
    received = ", ".join(str(schedule.bytes(rank)) for rank in range(schedule.world))
    yield f"{name}, bytes received by ranks 0 to {schedule.world - 1}: {received}"


def example_pictures() -> None:
    """The pictures of the worked example."""
    ring = example_plan("ring")
    draw_mask(ring.mask, ring.layout, IMAGES / "example_mask.png")
    draw_work(ring, IMAGES / "example_work.png")
    for method in ("ring", "direct"):
        for direction in DIRECTIONS:
            draw_steps(example_plan(method), IMAGES / f"{method}_{direction}.png", direction)


def overview(path: Path) -> None:
    """A pack of 65,536 tokens over four ranks: its mask by owner, and each rank's work."""
    mask = ra.masks.documents(_pack_lengths(65_536), causal=True)
    plans = [_overview_plan(mask, layout) for layout in ("contiguous", "area_greedy")]
    figure = new_figure(11.5, 5.4)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    paint_mask(figure.add_subplot(grid[:, 0]), mask, plans[1].layout)
    first = None
    for row, plan in enumerate(plans):
        first = figure.add_subplot(grid[row, 1], sharex=first)
        _paint_bars(first, plan)
    figure.savefig(path)


def head_groups(path: Path) -> None:
    """Three head groups of one mask: retrieval heads, streaming heads, block-sparse heads."""
    tokens, block = 65_536, 2048
    matrix = np.random.default_rng(0).random((tokens // block, tokens // block)) < 0.25
    matrix |= np.eye(len(matrix), dtype=bool)
    groups = {
        "8 heads: causal": (8, ra.masks.causal(tokens)),
        "20 heads: sinks and a window": (20, ra.masks.streaming(tokens, 2048, 8192)),
        "4 heads: blocks of 2,048, causal": (
            4, ra.masks.blocks(matrix, block, block, within=ra.masks.causal(tokens))
        ),
    }  # fmt: skip
    mask = ra.masks.per_head(list(groups.values()))
    layout, first = ra.layouts.zigzag(tokens, RANKS), 0
    figure = new_figure(15.5, 5.0)
    for column, (title, (count, _)) in enumerate(groups.items()):
        axes = figure.add_subplot(1, 3, column + 1)
        paint_mask(axes, mask.for_heads(32, first, first + count), layout)
        axes.set_title(title, fontsize=11)
        if column < len(groups) - 1 and (legend := axes.get_legend()) is not None:
            legend.remove()
        first += count
    figure.savefig(path)


def _overview_plan(mask: ra.Mask, layout: str) -> ra.Plan:
    context = ra.ContextParallel(
        RANKS, heads=(32, 8), head_dim=128, dtype=torch.bfloat16, method="direct", layout=layout
    )
    return context.plan(mask)


def _paint_bars(axes, plan: ra.Plan) -> None:
    """Forward and backward work of each rank, one piece per step, in the ranks' colours."""
    work = np.concatenate([plan.forward.work, plan.backward.work], axis=1)
    scale, unit = pair_unit(int(work.sum(axis=1).max()))
    left = np.zeros(len(work))
    for step in work.T:
        axes.barh(
            range(len(work)), step / scale, left=left, color=PALETTE[: len(work)],
            edgecolor="white", linewidth=0.8,
        )  # fmt: skip
        left += step / scale
    axes.axvline(left.mean(), color="black", linestyle="--", linewidth=1)
    busiest = left.max() / left.mean()
    axes.set_title(f"{plan.layout.name}: busiest rank {busiest:.2f} × mean (dashed)", fontsize=10)
    axes.set_yticks(range(len(work)), [f"rank {rank}" for rank in range(len(work))])
    axes.invert_yaxis()
    axes.set_xlabel(f"forward + backward, one piece per step: {unit}", fontsize=9)


def _pack_lengths(total: int) -> list[int]:
    """Log-normal document lengths that fill a pack; the last one is cut."""
    lengths, random = [], np.random.default_rng(7)
    while sum(lengths) < total:
        drawn = int(np.clip(random.lognormal(8.0, 1.3), 16, 24_000))
        lengths.append(min(drawn, total - sum(lengths)))
    return lengths


def main(arguments: list[str]) -> None:
    """Prints the tables; writes the pictures too unless asked for the tables only."""
    print("\n\n".join(tables()))
    if "--tables" not in arguments:
        IMAGES.mkdir(exist_ok=True)
        example_pictures()
        overview(IMAGES / "overview.png")
        head_groups(IMAGES / "head_groups.png")


if __name__ == "__main__":
    main(sys.argv[1:])
