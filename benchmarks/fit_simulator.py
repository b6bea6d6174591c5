"""Fits the simulator to a table of published results.

    python -m ringattn.benchmarks.fit_simulator TABLE.csv [--write configs/calibration/fitted.yaml]

Starts from data sheets (`configs/calibration/prior.yaml`), linearises twice, and writes the figures
of clusters and steps and the effects that rows share. The same table gives the same file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringattn.benchmarks.simulator.calibration_file import dump_calibration
from ringattn.benchmarks.simulator.figures import Figures
from ringattn.benchmarks.simulator.fitting import linearise, solve, with_verdicts
from ringattn.benchmarks.simulator.predict import Calibration
from ringattn.benchmarks.simulator.records import Published, read
from ringattn.errors import UserError

ROUNDS = 2


def fitted(rows: Sequence[Published]) -> Calibration:
    """The fit to all rows, linearised anew around the first one's figures.

    Raises:
        UserError: no row that a fit could use.
    """
    found = Calibration(Figures())
    for _ in range(ROUNDS):
        model = linearise(rows, found.figures)
        if not model.rows:
            raise UserError("the table", "holds no row to fit to", "give speeds, times or memory")
        found = solve(model, np.arange(len(model.rows)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", help="CSV of published results")
    parser.add_argument("--write", default="configs/calibration/fitted.yaml")
    args = parser.parse_args(argv)
    try:
        rows = read(args.table)
        found = fitted(with_verdicts(rows))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Path(args.write).write_text(dump_calibration(found, f"{len(rows)} rows"), encoding="utf-8")
    print(f"wrote {args.write}: {len(found.figures.values)} figures, {len(found.effects)} effects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
