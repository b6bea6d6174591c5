"""The table of all methods as Markdown and JSON: one row per way to run, one column per mask."""

import json
from dataclasses import dataclass, field
from pathlib import Path

# The published ways, each on the layouts that it is published with; the better one counts.
PUBLISHED = {
    "ring": ("ring", ("contiguous", "zigzag")),
    "USP": ("usp", ("contiguous", "zigzag")),
    "all-gather": ("all_gather", ("contiguous", "zigzag")),
    "area-greedy direct": ("direct,stages=2", ("area_greedy,chunk=2048", "area_greedy")),
}


@dataclass
class Results:
    """What was measured: per mask the rows, the kernel's rates on one rank and the sweep's best."""

    cluster: str
    ranks: int
    tokens: int
    rows: dict[str, list[dict]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)
    best: dict[str, dict] = field(default_factory=dict)

    def add(
        self, mask: str, rows: list[dict], single: float, alone: float, best: dict | None
    ) -> None:
        """Takes the figures of a mask."""
        self.rows[mask], self.single[mask], self.alone[mask] = rows, single, alone
        if best is not None:
            self.best[mask] = best

    def auto(self, mask: str) -> dict:
        """The row of "auto"."""
        return next(row for row in self.rows[mask] if row["method"].startswith("auto"))

    def published(self, mask: str) -> dict[str, float]:
        """TFLOP/s of each published way."""
        return {
            name: max(
                row["tflops"]
                for row in self.rows[mask]
                if row["method"] == method and row["layout"] in places
            )
            for name, (method, places) in PUBLISHED.items()
            if any(r["method"] == method and r["layout"] in places for r in self.rows[mask])
        }


def write_summary(results: Results, table: Path, summary: Path) -> None:
    """Writes the Markdown table and the JSON summary."""
    table.write_text("\n".join(_lines(results)) + "\n", encoding="utf-8")
    summary.write_text(json.dumps(_summary(results), indent=1) + "\n", encoding="utf-8")


def _summary(results: Results) -> dict:
    found = {"cluster": results.cluster, "ranks": results.ranks, "tokens": results.tokens}
    for mask in results.rows:
        auto, published = results.auto(mask), results.published(mask)
        found[mask] = {
            "auto": auto,
            "published_tflops": published,
            "auto_over_published": auto["tflops"] / max(published.values()),
            "single_tflops": results.single[mask],
            "alone_tflops": results.alone[mask],
            "sweep": results.best.get(mask),
        }
    return found


def _lines(results: Results) -> list[str]:
    masks = list(results.rows)
    lines = [
        f"Simulated on {results.cluster}, {results.ranks} ranks of {results.tokens} tokens, 64:8 "
        "heads of 128, bfloat16: TFLOP/s per rank, forward and backward (forward / backward).",
        "",
        "| way | " + " | ".join(masks) + " |",
        "| --- |" + " ---: |" * len(masks),
    ]
    cells = {mask: {_way(row): row for row in rows} for mask, rows in results.rows.items()}
    for way in dict.fromkeys(way for mask in masks for way in cells[mask]):
        lines.append(
            f"| {way} | " + " | ".join(_cell(cells[mask].get(way)) for mask in masks) + " |"
        )
    lines += [
        _line("auto over the best published", masks, _over_published, results),
        _line("auto over one rank, whole sequence", masks, _over_single, results),
        _line("auto over one rank, a rank's tokens", masks, _over_alone, results),
    ]
    if results.best:
        lines.append(_line("auto's time over the sweep's best", masks, _over_best, results))
    lines += ["", "What auto chose, and what it cost to choose:", ""]
    for mask in masks:
        auto = results.auto(mask)
        text = f"- {mask}: {auto['method'].removeprefix('auto: ')}, {auto['plan_ms']:.0f} ms"
        if mask in results.best:
            best = results.best[mask]
            text += f"; best of {best['priced']} swept: {best['method']} over {best['layout']}"
        lines.append(text)
    return lines


def _way(row: dict) -> str:
    if row["method"].startswith("auto"):
        return "**auto**"
    return f"{row['method']} over {row['layout']}"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['tflops']:.0f} ({row['forward_tflops']:.0f} / {row['backward_tflops']:.0f})"


def _line(name: str, masks: list[str], value, results: Results) -> str:
    return f"| {name} | " + " | ".join(value(results, mask) for mask in masks) + " |"


def _over_published(results: Results, mask: str) -> str:
    published = results.published(mask)
    best = max(published, key=lambda name: published[name])
    return f"{results.auto(mask)['tflops'] / published[best]:.2f} × {best}"


def _over_single(results: Results, mask: str) -> str:
    return f"{100 * results.auto(mask)['tflops'] / results.single[mask]:.0f} %"


def _over_alone(results: Results, mask: str) -> str:
    return f"{100 * results.auto(mask)['tflops'] / results.alone[mask]:.0f} %"


def _over_best(results: Results, mask: str) -> str:
    return f"{results.best[mask]['auto_over_best']:.3f}" if mask in results.best else ""
