"""The table and the plot of `measured_methods`, from its records."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.benchmarks.peers import OURS, YARDSTICK
from ringattn.benchmarks.peers.cases import DENSE, NAMES
from ringattn.benchmarks.record import Record, read_records

MOST = 1.05  # of a peer's CPU time or bytes that ringattn may take where no work can be skipped
COLORS = ("#1f77b4", "#ff7f0e", "#bcbd22", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e377c2")


def write_report(path: Path, seq_len: int) -> None:
    """Writes `path`.md and `path`.png from the records of one length; prints the table."""
    latest = {r.case: r for r in read_records(path) if r.config["seq_len"] == seq_len}
    records = list(latest.values())
    text = table(records)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if any(r.status == "ok" for r in records):
        plot(records, path.with_suffix(".png"))


def table(records: Iterable[Record]) -> str:
    """Markdown: one table per number of ranks."""
    parts = []
    for world, mine in _by(records, "ranks"):
        parts += [f"### {world} ranks\n", _HEADER]
        for _, rows in sorted(_by(mine, "mask"), key=lambda item: NAMES.index(item[0])):
            ours = next((r for r in rows if r.config["contender"] == OURS.name), None)
            parts += [_line(row, ours) for row in rows]
        parts.append("")
    return "\n".join(parts)


_COLUMNS = (
    "mask",
    "contender",
    "CPU s, all ranks",
    "ringattn / it",
    "wall s",
    "MB sent per rank, mean (most)",
    "worst error",
    "bar",
    "how",
)
_HEADER = f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def _line(row: Record, ours: Record | None) -> str:
    c = row.config
    if row.status != "ok" or row.value is None:
        return f"| {c['mask']} | {c['contender']} | {row.status} | | | | | | {row.reason} |"
    sent = np.array(c["sent_bytes"]) / 1e6
    wire = f"{sent.mean():.2f} ({sent.max():.2f})" if sent.size else "not counted"
    ratio = f"{c['cpu_ratio']:.2f} ± {c['cpu_ratio_spread']:.2f}" if "cpu_ratio" in c else ""
    is_peer = c["contender"] != YARDSTICK.name and not c["contender"].startswith(OURS.name)
    return (
        f"| {c['mask']} | {c['contender']} | {row.value:.3f} ± {row.spread:.3f} "
        f"| {'' if row is ours else ratio} | {c['wall_s']:.3f} "
        f"| {wire} | {max(c['errors'].values()):.0e} "
        f"| {_bar(row, ours) if is_peer and ours else ''} | {c['how']} |"
    )


def _bar(peer: Record, ours: Record) -> str:
    """Whether ringattn met its bar against a peer, with what it missed.

    Fewer bytes and less CPU time where a mask has work to skip; where it has none, at most `MOST`
    times the peer's of both.
    """
    if ours.status != "ok":
        return ours.status
    most = MOST if peer.config["mask"] in DENSE else 1.0
    missed = []
    sent = peer.config["sent_bytes"]
    if sent and sum(ours.config["sent_bytes"]) > most * sum(sent):
        missed.append("bytes")
    if peer.config["cpu_ratio"] > most:
        missed.append("CPU")
    return "missed: " + ", ".join(missed) if missed else "met"


def plot(records: Sequence[Record], path: Path) -> None:
    """CPU time over the yardstick's, and bytes sent per rank, mask by mask."""
    # Imported here: matplotlib takes longer to load than the tables take to write.
    from matplotlib.figure import Figure

    done = [r for r in records if r.status == "ok"]
    worlds = [world for world, _ in _by(done, "ranks")]
    names = list(dict.fromkeys(r.config["contender"] for r in done))
    names = [name for name in names if name != YARDSTICK.name]
    masks = [m for m in NAMES if any(r.config["mask"] == m for r in done)]
    figure = Figure(figsize=(6.5 * len(worlds), 7), layout="constrained")
    axes = figure.subplots(2, len(worlds), squeeze=False, sharey="row")
    for column, world in enumerate(worlds):
        mine = {(r.config["mask"], r.config["contender"]): r for r in done
                if r.config["ranks"] == world}  # fmt: skip
        for index, name in enumerate(names):
            at = np.arange(len(masks)) + (index - (len(names) - 1) / 2) * 0.8 / len(names)
            color, width = COLORS[index % len(COLORS)], 0.8 / len(names)
            rows = [mine.get((mask, name)) for mask in masks]
            bars = [_over_yardstick(r, mine) for r in rows], [_megabytes(r) for r in rows]
            for axis, heights in zip(axes[:, column], bars, strict=True):
                axis.bar(at, heights, width, color=color, label=name)
        axes[0, column].axhline(1.0, color="black", linewidth=0.8)
        axes[0, column].set_title(f"{world} gloo ranks")
        for axis in axes[:, column]:
            axis.set_xticks(range(len(masks)), [m.replace("_", "\n") for m in masks], fontsize=8)
    axes[0, 0].set_ylabel(f"CPU time over {YARDSTICK.name.replace('_', ' ')}'s")
    axes[1, 0].set_ylabel("MB sent per rank (mean)")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _over_yardstick(row: Record | None, rows: dict[tuple[str, str], Record]) -> float:
    base = rows.get((row.config["mask"], YARDSTICK.name)) if row else None
    if row is None or base is None or row.value is None or not base.value:
        return float("nan")
    return row.value / base.value


def _megabytes(row: Record | None) -> float:
    sent = row.config["sent_bytes"] if row else []
    return float(np.mean(sent)) / 1e6 if sent else float("nan")


def _by(records: Iterable[Record], key: str) -> list[tuple[Any, list[Record]]]:
    """Records grouped by a value of their config, in order of first appearance."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(record.config[key], []).append(record)
    return list(groups.items())
