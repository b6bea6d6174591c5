"""Whether two runs of the same command agree.

    python -m ringattn.benchmarks.repeatability A.jsonl B.jsonl [--tolerance 0.03] [--figure NAME]

Compares a figure of every case that both files hold: the CPU time of the busiest rank over that of
one process in the same round (``cpu_ratio``, the default), or ``seconds`` of the slowest rank,
which repeats on quiet hardware only. Prints a table and exits with 1 where a case differs by more
than the tolerance, with 2 where the files have no such case in common.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.benchmarks.record import Record, read_records, refused
from ringattn.errors import UserError

FIGURES = ("cpu_ratio", "cpu_seconds", "seconds")


@dataclass(frozen=True)
class Pair:
    """A case in both files: the figure in each, and their relative difference."""

    case: str
    group: str
    first: float
    second: float

    @property
    def gap(self) -> float:
        """The larger over the smaller, less 1."""
        low, high = sorted((self.first, self.second))
        return high / low - 1


def pairs_of(
    first: Sequence[Record], second: Sequence[Record], figure: str, direction: str
) -> list[Pair]:
    """Cases of one direction that have the figure in both files."""
    other = _figures(second, figure, direction)
    return [
        Pair(case, group, value, other[case][1])
        for case, (group, value) in _figures(first, figure, direction).items()
        if case in other
    ]


def _figures(
    records: Sequence[Record], figure: str, direction: str
) -> Mapping[str, tuple[str, float]]:
    """Case -> (suite and ranks, figure); of a case that comes twice the last."""
    found = {}
    for record in records:
        value = record.figures.get(figure)
        if record.status != "ok" or record.config.get("direction") != direction or not value:
            continue
        found[f"{record.name} {record.case}"] = (
            f"{record.config.get('suite')}, {record.config.get('ranks')} ranks", value
        )  # fmt: skip
    return found


def table(pairs: Sequence[Pair], tolerance: float) -> list[str]:
    """Lines: per group how far cases differ, then the cases beyond the tolerance."""
    lines = [f"{'group':28}{'cases':>7}{'median':>9}{'p90':>9}{'most':>9}{'within':>9}"]
    for group in dict.fromkeys(pair.group for pair in pairs):
        gaps = np.array([pair.gap for pair in pairs if pair.group == group])
        middle, high = np.percentile(gaps, [50, 90])
        within = (gaps <= tolerance).mean()
        lines.append(
            f"{group:28}{len(gaps):7}{middle:9.2%}{high:9.2%}{gaps.max():9.2%}{within:9.0%}"
        )
    beyond = sorted((p for p in pairs if p.gap > tolerance), key=lambda p: -p.gap)
    return lines + [f"{p.gap:7.2%}  {p.first:.5g} and {p.second:.5g}  {p.case}" for p in beyond]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("first", metavar="A.jsonl")
    parser.add_argument("second", metavar="B.jsonl")
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--figure", choices=FIGURES, default=FIGURES[0])
    parser.add_argument("--direction", choices=("forward", "backward", "both"), default="both")
    args = parser.parse_args(arguments)
    try:
        first, second = read_records(args.first), read_records(args.second)
        pairs = pairs_of(first, second, args.figure, args.direction)
        if not pairs:
            raise UserError(
                f"{args.first} {args.second}",
                f"have no case with {args.figure} in common",
                "give two results of the same command",
            )
    except UserError as error:
        refused(error)
    print("\n".join(table(pairs, args.tolerance)))
    return int(any(pair.gap > args.tolerance for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
