"""Speed, memory and accuracy of every local kernel on every mask, length and shape.

    python -m ringattn.benchmarks.kernels [--subset cpu|headline|all] [--minutes M] [filters]
    python -m ringattn.benchmarks.kernels --report          # table, plot and bars of what is there
    python -m ringattn.benchmarks.kernels --write-table     # what kernel="auto" chooses by

TFLOP/s by exact area: 2 (D + E) per pair and query head forward, 2 (3 D + 2 E) backward, which
recomputes (2.5 times the forward for D = E). Medians of repetitions; see
`ringattn.benchmarks.kernel_measure` for what is timed and `kernel_reference` for what is checked.

Cases come in order of importance and everything measured is in the file at once, so that the
command can be stopped, or stops by itself after `--minutes`, and goes on when it is run again.
What a kernel refuses, its errors and wrong results are recorded with the reason. A measurement in
which the process ended is recorded as an error by the next run.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ringattn.benchmarks import kernel_cases, kernel_report, kernel_results
from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.kernel_masks import NAMES
from ringattn.benchmarks.kernel_measure import DIRECTIONS, LOST, Bench, Outcome
from ringattn.benchmarks.record import Recorder, refused
from ringattn.errors import UserError
from ringattn.kernels import kernel_by_name, kernel_names
from ringattn.kernels.measured import SHIPPED, Table, architecture_of
from ringattn.schedule import Direction

NAME = "kernels"
UNIT = "TFLOP/s"
MINUTES = {"cpu": 2.0, "headline": 8.0}


class Runner:
    """Measures cases that the file does not hold yet, and records them."""

    def __init__(self, out: Path, device: torch.device, retry: bool = False) -> None:
        self.out, self.device = out, device
        self.recorder = Recorder(out)
        self.marker = out.with_suffix(".running")
        self._again = kernel_results.without_figure(out) if retry else set()
        self._blame_interrupted()

    def case_name(self, case: Case, kernel: str, direction: Direction) -> str:
        """The name of a record."""
        return f"{case}-{direction}-{kernel}-{architecture_of(self.device)}"

    def missing(self, case: Case, kernel: str) -> tuple[Direction, ...]:
        """Directions without a record."""
        return tuple(
            d
            for d in DIRECTIONS
            if (name := self.case_name(case, kernel, d)) in self._again
            or not self.recorder.has(NAME, name)
        )

    def run(self, case: Case, bench: Bench, kernel: str) -> Iterator[Outcome]:
        """Measures and records one kernel on one case."""
        directions = self.missing(case, kernel)
        names = {d: self.case_name(case, kernel, d) for d in directions}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(json.dumps([asdict(case), kernel, names]), encoding="utf-8")
        try:
            for outcome in bench.measure(kernel_by_name(kernel), directions):
                config = bench.config(outcome.direction)
                self._record(names[outcome.direction], outcome, config, kernel)
                yield outcome
        finally:
            self.marker.unlink(missing_ok=True)

    def give_up(self, case: Case, kernel: str, status: str, reason: str) -> None:
        """Records that a kernel cannot be measured on a case: refused, or an error."""
        for d in self.missing(case, kernel):
            outcome = Outcome(direction=d, status=status, reason=reason)
            config = {**asdict(case), "direction": d}
            self._record(self.case_name(case, kernel, d), outcome, config, kernel)

    def _place(self) -> dict[str, str]:
        return {"architecture": architecture_of(self.device)}

    def _record(self, name: str, outcome: Outcome, config: dict, kernel: str) -> None:
        config = {**config, "kernel": kernel, **self._place(), **outcome.figures}
        if outcome.status == "ok":
            assert outcome.tflops is not None
            self.recorder.ok(
                NAME, name, outcome.tflops, UNIT, spread=outcome.spread, config=config
            )  # fmt: skip
        else:
            record = getattr(self.recorder, outcome.status)
            record(NAME, name, UNIT, outcome.reason, config=config)
        self._again.discard(name)

    def _blame_interrupted(self) -> None:
        """An error for the measurement in which the last process ended without a word."""
        if not self.marker.exists():
            return
        fields, kernel, names = json.loads(self.marker.read_text(encoding="utf-8"))
        for direction, name in names.items():
            if not self.recorder.has(NAME, name):
                config = {**fields, "direction": direction, "kernel": kernel, **self._place()}
                reason = "the process ended during this measurement"
                self.recorder.error(NAME, name, UNIT, reason, config=config)
        self.marker.unlink()


def measure(
    runner: Runner, cases: Sequence[Case], kernels: Sequence[str], args: argparse.Namespace
) -> bool:
    """Measures what is missing until the time is up; whether everything is there."""
    begin = time.monotonic()
    limit = args.minutes if args.minutes is not None else MINUTES.get(args.subset, float("inf"))
    todo = _todo(runner, cases, kernels)
    count, done = sum(len(names) for _, names in todo), 0
    print(f"{count} measurements of {len(todo)} cases left, at most {limit:g} minutes", flush=True)
    for case, names in todo:
        bench = Bench(case, runner.device, args.seconds)
        for kernel in names:
            minutes = (time.monotonic() - begin) / 60
            if minutes >= limit:
                print(f"time is up, {count - done} measurements are left: run it again to go on")
                return False
            done += 1
            figures = _measured(runner, case, bench, kernel)
            progress = f"[{done}/{count} {minutes:.1f} min]"
            print(f"{progress} {case!s:44} {kernel:10} {figures}", flush=True)
    return True


def _todo(
    runner: Runner, cases: Sequence[Case], kernels: Sequence[str]
) -> list[tuple[Case, list[str]]]:
    """Cases with the kernels to measure on them; records what kernels refuse outright."""
    todo: dict[Case, list[str]] = {}
    refused: Counter[tuple[str, str]] = Counter()
    for case in cases:
        bench = Bench(case, runner.device)
        for kernel in kernels:
            if not runner.missing(case, kernel):
                continue
            reason = bench.refusal(kernel_by_name(kernel))
            if reason is None:
                todo.setdefault(case, []).append(kernel)
                continue
            runner.give_up(case, kernel, "refused", reason)
            refused[kernel, reason] += 1
    for (kernel, reason), count in refused.items():
        print(f"{kernel} refuses {count} cases: {reason}")
    return list(todo.items())


def _measured(runner: Runner, case: Case, bench: Bench, kernel: str) -> str:
    """Measures, and says how it went in a few words."""
    try:
        _ = bench.reference
    except (UserError, RuntimeError) as error:  # too large for the device, whatever the kernel
        reason = f"inputs and reference: {type(error).__name__}: {error}"[:300]
        runner.give_up(case, kernel, "error", reason)
        return reason
    found: list[Outcome] = []
    try:
        found.extend(runner.run(case, bench, kernel))
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        # Such an error stays with the process: whatever is measured next would fail too.
        reason = f"the device's context is lost: {str(error).splitlines()[0]}"
        runner.give_up(case, kernel, "error", reason)
        print(f"{case} with {kernel}: {reason}; run the command again", file=sys.stderr)
        raise SystemExit(LOST) from None
    return "  ".join(
        f"{o.direction} {o.tflops:.3g} ± {o.spread:.2g} {UNIT}"
        if o.status == "ok"
        else f"{o.direction} {o.status}: {o.reason[:70]}"
        for o in found
    )


def write_table(out: Path, target: Path) -> None:
    """Merges the medians of a results file into a table of measured kernels."""
    old = Table()
    if target.exists():
        old = Table.from_json(target.read_text(encoding="utf-8"), target.name)
    rows = kernel_results.table_rows(out)
    if not rows:
        raise UserError(f"{out}", "holds no measured kernels", "measure some first")
    new = old.merged(rows)
    target.write_text(new.to_json(), encoding="utf-8")
    print(f"{target}: {len(rows)} rows merged, {len(new.rows)} in all")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except UserError as error:
        refused(error)


def _run(args: argparse.Namespace) -> None:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.subset = args.subset or ("headline" if device.type == "cuda" else "cpu")
    if args.seconds is None:
        args.seconds = 0.5 if device.type == "cuda" else 0.1
    out = Path(args.out)
    if args.write_table:
        write_table(out, Path(args.write_table))
        return
    if not args.report:
        # The fallback would spend minutes where the others spend milliseconds, and FlexAttention
        # may compile for each mask.
        offered = [n for n in kernel_names() if device.type == "cpu" or n != "matmul"]
        kernels = args.kernels or sorted(offered, key=lambda name: name == "flex")
        for name in kernels:
            kernel_by_name(name)
        cases = kernel_cases.selected(
            kernel_cases.subset(args.subset), masks=args.masks, lengths=args.lengths,
            heads=args.heads, head_dims=args.head_dims, dtype=args.dtype,
        )  # fmt: skip
        torch.set_num_threads(args.threads)
        measure(Runner(out, device, args.retry), cases, kernels, args)
    kernel_report.write_report(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/kernels.jsonl")
    parser.add_argument("--subset", choices=kernel_cases.SUBSETS,
                        help="default: headline on a GPU, else cpu")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="stop after; default 8 for headline, 2 cpu")
    parser.add_argument(
        "--seconds", type=float, help="of repetitions per direction; default 0.5, 0.1 on the CPU"
    )
    parser.add_argument("--kernels", nargs="+", help=f"of {', '.join(kernel_names())}")
    parser.add_argument("--masks", nargs="+", choices=NAMES, metavar="MASK")
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--heads", nargs="+", help="e.g. 64:8")
    parser.add_argument("--head-dims", nargs="+", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("--device", help="cpu or cuda; default cuda where there is one")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU, where times are summed over threads"
    )
    parser.add_argument(
        "--retry", action="store_true", help="measure what was refused or an error again"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument(
        "--write-table", nargs="?", const=str(SHIPPED), metavar="FILE",
        help="merge the results into the selector's table; measure nothing",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
