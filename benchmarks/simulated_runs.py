"""The cost model against runs of this machine: attention steps of real plans over gloo ranks.

    python -m ringattn.benchmarks.simulated_runs [--world 2 4] [--masks …] [--methods …] [--report]

For each number of ranks `ringattn doctor` measures the machine and writes the cluster file that a
user would get. Then every method runs every mask, forward and backward, float32; methods take turns
within a mask. The same plans are priced with the measured cluster. A record's value is the relative
error of the predicted time of the slowest rank; its figures hold seconds and CPU seconds, measured
and predicted. CPU seconds are those of the busiest rank, all threads: on a machine that others use
too, they are the figure to read.

Ranks share the machine's cores, also where they are more than the cores: the model knows that.
Cells that the file holds are not measured again; a cluster file beside it is used again.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ringattn.benchmarks.host_runs import (
    TIMEOUT,
    Cell,
    Forget,
    Prediction,
    Prepare,
    Seconds,
    Time,
    answer,
    predict,
)
from ringattn.benchmarks.peer_ranks import PoolError, RankPool
from ringattn.benchmarks.record import Recorder, read_records, refused
from ringattn.benchmarks.simulated_report import NAME, error_table
from ringattn.benchmarks.suites.mask_cases import LEAST, expanded
from ringattn.cost import Cluster, load_cluster
from ringattn.errors import UserError
from ringattn.methods import METHODS
from ringattn.plan import Plan

UNIT = "relative error"
DEFAULT = "benchmarks/results/simulated_runs.jsonl"


def measured_cluster(world: int, path: Path) -> Cluster:
    """The cluster file of `ringattn doctor` for so many local ranks, made where it is missing.

    Raises:
        UserError: doctor found something wrong.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ringattn.launch", "doctor", "--device", "cpu"]
        command += ["--ranks", str(world), "--timeout", "120", "--out", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise UserError(
                f"doctor with {world} ranks", f"has to succeed ({' '.join(last)})", "run it alone"
            )
    return load_cluster(path)


@contextmanager
def rank_pool(world: int, threads: int) -> Iterator[RankPool]:
    """Gloo ranks that time cells."""
    with RankPool(world, threads, answer=answer) as pool:
        yield pool


def measure(
    pool: RankPool, cells: Sequence[Cell], plans: dict[Cell, Plan], rounds: int
) -> dict[Cell, list[list[Seconds]]]:
    """Times cells in rounds; who begins moves on by one each round.

    Raises:
        PoolError: a rank failed or planned something else.
    """
    for cell in cells:
        digests = pool.ask(Prepare(cell), TIMEOUT)
        if set(digests) != {plans[cell].digest}:
            raise PoolError(f"{cell.name}: ranks run another plan than the priced one")
    found: dict[Cell, list[list[Seconds]]] = {cell: [] for cell in cells}
    for number in range(rounds):
        shift = number % max(1, len(cells))
        for cell in [*cells[shift:], *cells[:shift]]:
            found[cell].append(pool.ask(Time(cell), TIMEOUT))
    pool.ask(Forget(), TIMEOUT)
    return found


def record(
    recorder: Recorder, cell: Cell, plan: Plan, runs: list[list[Seconds]], made: Prediction
) -> float:
    """Writes a cell's record; returns the relative error."""
    walls = [max(rank.wall for rank in ranks) for ranks in runs]
    wall, cpu = statistics.median(walls), _median(runs, "cpu")
    error = made.wall / wall - 1.0
    spread = float(np.subtract(*np.percentile(walls, [75, 25])) / 2) / wall
    recorder.ok(
        NAME,
        cell.name,
        error,
        UNIT,
        spread=spread,
        config=config_of(cell, plan),
        figures={
            "seconds": wall,
            "predicted_seconds": made.wall,
            "cpu_seconds": cpu,
            "predicted_cpu_seconds": made.cpu,
            "forward_seconds": _median(runs, "forward"),
            "predicted_forward_seconds": made.forward,
            "backward_seconds": _median(runs, "backward"),
            "predicted_backward_seconds": made.backward,
            "repeats": len(runs),
        },
    )
    return error


def _median(runs: list[list[Seconds]], name: str) -> float:
    """Median over runs of the largest figure of a rank."""
    return statistics.median(max(getattr(rank, name) for rank in ranks) for ranks in runs)


def config_of(cell: Cell, plan: Plan | None) -> dict[str, object]:
    """What a record says of its cell."""
    return {
        "suite": "simulated",
        "contender": "ringattn",
        "mask": cell.mask,
        "parameters": cell.sampled().parameters,
        "lengths": "short",
        "pack": 0,
        "seq_len": cell.seq_len,
        "method": cell.method,
        "layout": plan.layout.name if plan is not None else "auto",
        "ranks": cell.world,
        "ranks_per_node": cell.world,
        "heads": list(cell.heads),
        "head_dim": cell.head_dim,
        "dtype": "float32",
        "batch": 1,
        "direction": "both",
        "kernel": "cpu_flash",
        "device": "cpu",
        "simulated": False,
        "command": f"python -m ringattn.benchmarks.simulated_runs --world {cell.world} "
        f"--masks {cell.mask} --methods {cell.method} --seq-len {cell.seq_len}",
    }


def run_world(world: int, args: argparse.Namespace, recorder: Recorder) -> None:
    """Measures and records what the file does not hold yet for one number of ranks."""
    todo = {mask: _open_cells(mask, world, args, recorder) for mask in args.masks}
    if not any(todo.values()):
        return
    path = args.cluster or Path(args.json).with_suffix(f".p{world}.yaml")
    print(f"{world} ranks: cluster file {path.name}", flush=True)
    cluster = measured_cluster(world, path)
    with rank_pool(world, cluster.cores) as pool:
        for mask, cells in todo.items():
            start = time.monotonic()
            plans = _plans(cells, recorder)
            try:
                found = measure(pool, list(plans), plans, args.repeats)
            except PoolError as error:
                for cell in plans:
                    recorder.error(NAME, cell.name, UNIT, str(error), config_of(cell, plans[cell]))
                print(f"{mask}, {world} ranks: {error}", file=sys.stderr)
                return
            errors = [
                record(recorder, cell, plan, found[cell], predict(plan, cluster))
                for cell, plan in plans.items()
            ]
            if errors:
                middle = statistics.median(abs(error) for error in errors)
                print(
                    f"{mask}, {world} ranks: median error {middle:.1%} of {len(errors)} methods, "
                    f"{time.monotonic() - start:.0f} s",
                    flush=True,
                )


def _open_cells(mask: str, world: int, args: argparse.Namespace, recorder: Recorder) -> list[Cell]:
    heads = (args.heads[0], args.heads[1])
    cells = [
        Cell(mask, method, world, args.seq_len, heads, args.head_dim) for method in args.methods
    ]
    return [cell for cell in cells if not recorder.has(NAME, cell.name)]


def _plans(cells: list[Cell], recorder: Recorder) -> dict[Cell, Plan]:
    """Plans of the cells that can be planned; the others are recorded as refused."""
    plans = {}
    for cell in cells:
        try:
            plans[cell] = cell.plan(cell.world)
        except UserError as error:
            recorder.refused(NAME, cell.name, UNIT, str(error), config_of(cell, None))
    return plans


def parser() -> argparse.ArgumentParser:
    """Arguments."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--world", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    made.add_argument(
        "--masks", nargs="+", default=["longca"], metavar="MASK", help="names, or all, longca, ours"
    )
    made.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=tuple(METHODS), metavar="METHOD"
    )
    made.add_argument("--seq-len", type=int, default=2048, help="of every mask")
    made.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("HQ", "HKV"))
    made.add_argument("--head-dim", type=int, default=64)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--cluster", type=Path, help="cluster file to price with, not measured")
    made.add_argument("--json", default=DEFAULT, help="records; cluster files lie beside it")
    made.add_argument("--report", action="store_true", help="only show what the file holds")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser().parse_args(argv)
    try:
        args.masks = expanded(args.masks)
        if args.seq_len < LEAST:
            raise UserError(f"--seq-len {args.seq_len}", f"must be at least {LEAST}", "try 2048")
        if min(args.world) < 2 or args.repeats < 1:
            raise UserError(
                "--world, --repeats", "need 2 ranks and 1 repeat at least", "see --help"
            )
        if not args.report:
            recorder = Recorder(args.json)
            for world in args.world:
                run_world(world, args, recorder)
    except UserError as error:
        refused(error)
    print("\n".join(error_table(read_records(args.json))))


if __name__ == "__main__":
    main()
