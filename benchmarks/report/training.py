"""The suite train: whole training steps, and their losses."""

from collections.abc import Sequence
from typing import Any

from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import Cell
from ringattn.benchmarks.report.charts import Line, Mark, lines_chart, rows_chart
from ringattn.benchmarks.report.coverage import reasons
from ringattn.benchmarks.report.markup import Html, element, joined
from ringattn.benchmarks.report.points import Group, Point, groups_of
from ringattn.benchmarks.report.tables import Column, table

_FIGURES = (
    ("Speed of the whole job", "tokens_per_second", "tokens/s"),
    ("Tokens per CPU second of all ranks", "tokens_per_cpu_second", "tokens/CPU s"),
    ("Model FLOP/s utilisation", "mfu", "MFU"),
    ("Time of a step", "step_seconds", "s"),
    ("Peak memory of a rank", "peak_bytes", "bytes"),
)


def train_section(cells: Sequence[Cell]) -> Html:
    """Losses, speeds and memory of every setting, then what has no figure."""
    parts = []
    for group in groups_of("train", cells):
        label = "simulated" if group.simulated else "measured"
        title = joined(group.title, " ", element("span", label, class_=f"tag {label}"))
        parts.append(joined(element("h3", title), _charts(group), _table(group)))
    return joined(*parts, reasons(cells))


def _charts(group: Group) -> Html:
    names = group.variants
    charts = [_losses(group, mask, ranks) for mask in group.masks for ranks in group.ranks]
    for title, name, unit in _FIGURES:
        rows = [
            (_row_name(group, mask, ranks), _marks(group, mask, ranks, name, unit))
            for mask in group.masks
            for ranks in group.ranks
        ]
        charts.append(rows_chart(title, rows, unit, names))
    charts = [chart for chart in charts if chart]
    return joined(plot.legend(names), plot.panels(charts)) if charts else Html()


def _of(group: Group, mask: str, ranks: int) -> list[Point]:
    return [p for p in group.points if p.mask == mask and p.ranks == ranks]


def _row_name(group: Group, mask: str, ranks: int) -> str:
    where = f"{ranks} rank{'s' * (ranks > 1)}"
    return where if len(group.masks) == 1 else f"{mask}, {where}"


def _marks(group: Group, mask: str, ranks: int, name: str, unit: str) -> list[Mark]:
    marks = []
    for point in _of(group, mask, ranks):
        value = point.value if unit == group.unit else point.figure(name)
        if value is not None:
            spread = point.spread if unit == group.unit else None
            tip = f"{point.variant}: {units.scale_of([value], unit).with_unit(value)}"
            series = group.variants.index(point.variant)
            marks.append(Mark(series, value, spread, tip, group.simulated))
    return marks


def _losses(group: Group, mask: str, ranks: int) -> Html:
    """Loss by step of every contender."""
    lines = []
    for point in _of(group, mask, ranks):
        losses = next((found for c in point.measured if (found := _numbers(c.config))), [])
        series = group.variants.index(point.variant)
        lines.append(Line(series, point.variant, tuple((k + 1, y) for k, y in losses)))
    title = f"Loss: {_row_name(group, mask, ranks)}"
    return lines_chart(title, lines, "step", "nats per token", steps=True)


def _numbers(config: Any) -> list[tuple[int, float]]:
    """The loss curve: finite numbers with their places."""
    losses = config.get("losses")
    if not isinstance(losses, list):
        return []
    return [
        (step, float(loss))
        for step, loss in enumerate(losses)
        if isinstance(loss, int | float) and abs(loss) < 1e9
    ]


def _table(group: Group) -> Html:
    points = group.points
    columns = [
        Column("data", [p.mask for p in points]),
        Column("who", [p.variant for p in points]),
        Column("method", [p.cells[0].text("method") for p in points]),
        Column("ranks", [p.ranks for p in points], ""),
        Column("speed", [p.value for p in points], group.unit, bars=True),
        Column("±", [p.spread for p in points], group.unit, like=[p.value for p in points]),
        Column("per CPU second", [p.figure("tokens_per_cpu_second") for p in points], "tokens"),
        Column("MFU", [p.figure("mfu") for p in points], "share"),
        Column("MFU of CPU time", [p.figure("mfu_cpu") for p in points], "share"),
        Column("step", [p.figure("step_seconds") for p in points], "s"),
        Column("CPU time", [p.figure("cpu_seconds") for p in points], "s"),
        Column("peak memory", [p.figure("peak_bytes") for p in points], "bytes"),
        Column("last loss", [p.figure("loss") for p in points], ""),
        Column("no figure", ["; ".join(p.reasons)[:240] for p in points]),
    ]
    return table(columns, summary="All figures")
