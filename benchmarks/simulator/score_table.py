"""The report of `score` as text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any], title: str) -> str:
    """Errors, ranking, verdicts, rows that are not scored, and assumptions, one line each."""
    lines = [
        title,
        f"  {'group':28} {'rows':>5} {'covered':>8} {'median':>7} {'p90':>7} {'bias':>7}",
    ]
    for name, one in result["groups"].items():
        lines.append(
            f"  {name:28} {one['rows']:5} {one['coverage']:8.1%} {_share(one.get('median')):>7} "
            f"{_share(one.get('p90')):>7} {_share(one.get('bias'), sign=True):>7}"
        )
    lines.append(f"  {'ranking':48} {'pairs':>6} {'right':>7} {'choices':>8} {'near':>7}")
    for name, one in result["ranking"].items():
        lines.append(
            f"  {name:48} {one['pairs']:6} {_share(one['ranked_right']):>7} {one['choices']:8} "
            f"{_share(one['near_best']):>7}"
        )
    lines.append(f"  {'verdicts':28} {'rows':>5} {'right':>7} {'>10 %':>6} {'right':>7}")
    for name, one in result["verdicts"].items():
        lines.append(
            f"  {name:28} {one['rows']:5} {_share(one['right']):>7} {one['far_rows']:6} "
            f"{_share(one['far_right']):>7}"
        )
    for miss in result["misses"]:
        lines.append(f"  line {miss['line']} ({miss['metric']}) not predicted: {miss['reason']}")
    for one in result["unreadable"]:
        lines.append(f"  line {one['line']} ({one['metric']}) not scored: {one['reason']}")
    told = Counter(text for one in result["assumed"] for text in one["assumed"])
    lines += [f"  assumed, {rows} rows: {text}" for text, rows in told.items()]
    return "\n".join(lines)


def _share(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if sign else f"{value:.1%}"
