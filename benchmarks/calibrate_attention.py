"""Holds the cost model against published attention speeds, and fits its figures to them.

    python -m ringattn.benchmarks.calibrate_attention TABLE.csv [--folds 3] [--write DIR]

For every attention-only row of the table the plan of the published method is built and priced (see
`ringattn.benchmarks.calibration_plans`). Printed and recorded per group of masks: the number of
rows, the median, the 90th percentile and the bias of the relative error, with the cluster files as
they are. `--folds N` adds errors on rows that a fit has not seen: N folds, rows of one run
together. `--write DIR` fits on all rows and writes the cluster files there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ringattn.benchmarks import calibration_fit as fitting
from ringattn.benchmarks.calibration_fit import Case
from ringattn.benchmarks.calibration_rows import CLUSTERS, read_rows
from ringattn.benchmarks.record import Recorder
from ringattn.cost import Cluster, dump_cluster, load_cluster


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("table", help="CSV of published results")
    parser.add_argument("--out", default="benchmarks/results/calibration.jsonl")
    parser.add_argument("--folds", type=int, default=0, help="0: no cross-validation")
    parser.add_argument("--write", help="folder for the fitted cluster files")
    parser.add_argument("--worst", type=int, default=0, help="print that many of the worst rows")
    args = parser.parse_args()
    rows = read_rows(args.table)
    cases, shipped, left_out = [], [], []
    for hardware in dict.fromkeys(row.hardware for row in rows):
        cluster = load_cluster(CLUSTERS[hardware])
        mine = [fitting.case_of(r, cluster) for r in rows if r.hardware == hardware]
        paths = fitting.free_figures([case.row for case in mine])
        if args.write:
            cluster = fitting.fit(mine, fitting.neutral(cluster, paths), paths)
            _write(cluster, Path(args.write))
        cases += mine
        shipped.append(fitting.errors(mine, cluster))
        if args.folds:
            left_out.append(_cross_validate(mine, cluster, paths, args.folds))
    recorder = Recorder(args.out)
    report(recorder, "fitted", cases, np.concatenate(shipped))
    if args.folds:
        report(recorder, f"left out, {args.folds} folds", cases, np.concatenate(left_out))
    for index in np.argsort(-np.abs(np.concatenate(shipped)))[: args.worst]:
        row, error = cases[index].row, np.expm1(np.concatenate(shipped)[index])
        print(f"{row.hardware:12} {row.gpus:3} {row.mask:12} {row.method:22} "
              f"{'+'.join(row.directions):16} {row.tflops:7.1f} {error:+.0%}")  # fmt: skip


def _cross_validate(
    cases: Sequence[Case], start: Cluster, paths: Sequence[str], count: int
) -> np.ndarray:
    """The error of each case under a fit to the other folds."""
    folds = fitting.folds_of([case.row for case in cases], count)
    error = np.zeros(len(cases))
    for fold in range(count):
        seen = [case for case, f in zip(cases, folds, strict=True) if f != fold]
        unseen = [case for case, f in zip(cases, folds, strict=True) if f == fold]
        if unseen and seen:
            fitted = fitting.fit(seen, fitting.neutral(start, paths), paths)
            error[folds == fold] = fitting.errors(unseen, fitted)
    return error


def _write(cluster: Cluster, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cluster.name}.yaml").write_text(dump_cluster(cluster), encoding="utf-8")


def report(recorder: Recorder, name: str, cases: Sequence[Case], error: np.ndarray) -> None:
    """Prints and records the errors by mask group, and by hardware within it."""
    relative = np.expm1(error)
    groups = [(case.row.group, case.row.hardware) for case in cases]
    keys = sorted({(g, "all") for g, _ in groups} | set(groups))
    print(f"{name}: rows, median, 90th percentile, bias")
    for group, hardware in keys:
        part = np.array([g == group and hardware in ("all", h) for g, h in groups])
        size = np.abs(relative[part])
        figures = {
            "rows": int(part.sum()),
            "p90": float(np.quantile(size, 0.9)),
            "bias": float(np.median(relative[part])),
        }
        median = float(np.median(size))
        print(f"  {group:10} {hardware:22} {figures['rows']:4} {median:7.1%} "
              f"{figures['p90']:7.1%} {figures['bias']:+7.1%}")  # fmt: skip
        recorder.ok("calibration", f"{group}-{hardware}-{name}", median, "ratio", config=figures)


if __name__ == "__main__":
    main()
