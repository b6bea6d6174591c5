"""Holds the simulator against a table of published results, row by row.

    python -m ringattn.benchmarks.validate_simulator TABLE.csv [--json]
        [--folds N [--by setting] | --leave-out SOURCE | --leave-out each | --datasheet]
        [--calibration FILE] [--worst N] [--rows]

Any CSV with the columns `metric` and `value` and some of those of the published record is taken:
names are looked up in `configs/calibration/*.yaml`, and what is missing has a stated default. Per
group: rows, coverage (a row that cannot be predicted is a miss, listed with its reason), median and
90th percentile of the relative error, signed bias; pairs more than 5 % apart that are ranked right;
how often the method that would be chosen is within 5 % of the best; out-of-memory verdicts, of the
table's own rows and of steps that were timed and so fitted.

A name that nobody knows is taken as a stated neighbour, and a count of GPUs that cannot be as the
default; the report tells what was assumed in how many rows. Values and units that cannot be read,
and values that cannot be, are listed and not scored. Lines are those of the file.

Without further options the fit that comes with the package predicts all rows. A fit that has seen
rows says little about them, so:

    --folds N           N folds of the table, rows of one run together: each is predicted by a fit
                        to the others; with --by setting all methods of one setting together, so
                        that a choice between them is made by one fit that has seen none of them
    --leave-out SOURCE  rows of the source are predicted by a fit to all others; "each" does so for
                        one source after the other
    --datasheet         no fit at all: data-sheet links and kernel shares
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ringattn.benchmarks.simulator.attention import Prices
from ringattn.benchmarks.simulator.calibration_file import load_calibration
from ringattn.benchmarks.simulator.figures import Figures
from ringattn.benchmarks.simulator.fitting import folds_of, linearise, solve, with_verdicts
from ringattn.benchmarks.simulator.predict import Calibration, predict
from ringattn.benchmarks.simulator.records import Published, read
from ringattn.benchmarks.simulator.score import Scored, group_of, score
from ringattn.benchmarks.simulator.score_table import table
from ringattn.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", help="CSV of published results")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--calibration", help="a fit; default the package's")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--folds", type=int, default=0, help="cross-validate on the table")
    how.add_argument("--leave-out", metavar="SOURCE", help='a source, or "each"')
    how.add_argument("--datasheet", action="store_true", help="predict without any fit")
    parser.add_argument("--by", choices=("run", "setting"), default="run", help="of folds")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--worst", type=int, default=0, help="print that many of the worst rows")
    parser.add_argument("--rows", action="store_true", help="every row's prediction, with --json")
    args = parser.parse_args(argv)
    try:
        rows = with_verdicts(read(args.table))
        if not rows:
            raise UserError(args.table, "holds no rows", "give a table of results")
        if args.folds:
            if args.folds < 2:
                raise UserError(f"--folds={args.folds}", "must be at least 2", "give 2 or more")
            title = f"cross-validated, {args.folds} folds by {args.by}"
            folds = folds_of(rows, args.folds, args.seed, by=args.by)
            found = held_out(rows, [f"{fold}" for fold in folds])
        elif args.leave_out:
            title, found = _sources(rows, args.leave_out)
        else:
            fit = Calibration(Figures()) if args.datasheet else load_calibration(args.calibration)
            title = "data sheets alone" if args.datasheet else "the given fit"
            found = predicted(rows, fit)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result = score(found)
    if args.json:
        extra = {"rows": [_shown(s) for s in found]} if args.rows else {}
        print(json.dumps({"title": title} | result | extra, indent=1))
    else:
        print(table(result, title))
        _print_worst(found, args.worst)
    return 0


def predicted(rows: Sequence[Published], fit: Calibration) -> list[Scored]:
    """Every row's prediction under one fit."""
    prices = Prices(fit.figures)
    return [_one(row, fit, prices) for row in rows]


def _one(row: Published, fit: Calibration, prices: Prices) -> Scored:
    try:
        return Scored(row, predict(row, fit, prices).value)
    except UserError as error:
        return Scored(row, None, str(error))
    except (ArithmeticError, LookupError, MemoryError, ValueError) as error:
        # A table that nobody has seen must not end the report; the row counts as a miss.
        return Scored(row, None, f"{type(error).__name__}: {error}")


def held_out(rows: Sequence[Published], parts: Sequence[str]) -> list[Scored]:
    """Each part of the rows, predicted by a fit to all rows of other parts."""
    model = linearise(rows, load_calibration().figures)
    label = {id(row): part for row, part in zip(rows, parts, strict=True)}
    inside = np.array([label[id(row)] for row in model.rows])
    found: dict[int, Scored] = {}
    for part in dict.fromkeys(parts):
        fit = solve(model, np.flatnonzero(inside != part))
        prices = Prices(fit.figures)
        for row in rows:
            if label[id(row)] == part:
                found[id(row)] = _one(row, fit, prices)
    return [found[id(row)] for row in rows]


def _sources(rows: Sequence[Published], wanted: str) -> tuple[str, list[Scored]]:
    known = list(dict.fromkeys(row.source for row in rows))
    if wanted == "each":
        return "each source left out in turn", held_out(rows, [row.source for row in rows])
    chosen = [name for name in known if wanted.lower() in name.lower()]
    if not chosen:
        raise UserError(f"--leave-out={wanted}", "names no source of the table", "; ".join(known))
    parts = ["out" if row.source in chosen else "in" for row in rows]
    found = held_out(rows, parts)
    mine = [one for one, part in zip(found, parts, strict=True) if part == "out"]
    return f"left out: {', '.join(chosen)}", mine


def _shown(one: Scored) -> dict:
    row = replace(one.row, split={})
    return {
        "line": row.line, "group": group_of(row), "published": row.value, "predicted": one.value,
        "error": one.error, "reason": one.reason,
    }  # fmt: skip


def _print_worst(found: Sequence[Scored], count: int) -> None:
    known = [s for s in found if s.error is not None]
    for one in sorted(known, key=lambda s: -abs(s.error or 0.0))[:count]:
        row = one.row
        print(
            f"  {one.error:+7.1%} line {row.line}: {row.hardware} {row.gpus} {row.model} "
            f"{row.seq_len} {row.mask} {row.method} {row.checkpointing} {row.metric}"
        )


if __name__ == "__main__":
    sys.exit(main())
