"""Attention on random cases until so many have run; the nightly command.

    python -m tests.fuzz [--cases N] [--seed N] [--jobs N]      make fuzz ARGS="--cases 2000"
    python -m tests.fuzz --case SEED                            repeats one case

Everything about a case follows from its seed: `tests/core/fuzz_cases.py`. Each case is planned,
proved on integers, run twice over simulated ranks and held against the dense float64 reference.
A failure is printed with the command that repeats it, also where the process died or hung.
Exit code: 1 when a case failed or too many were refused.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

# Before triton is imported: its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from ringattn.errors import UserError
from tests.core.fuzz_cases import draw_case
from tests.core.fuzz_check import check_seed

BATCH = 20  # cases handed to a process at once
SECONDS = 60.0  # a batch that takes so much longer per case hangs
PER_SEED = 10**6  # cases that one --seed may have before the next one's begin
MOST_REFUSED = 0.2


@dataclass(frozen=True)
class Outcome:
    """How one case ended: ok, refused (as it must be) or failed, with the reason."""

    seed: int
    status: str
    message: str = ""


def run_case(seed: int) -> Outcome:
    """Checks the case of a seed."""
    try:
        errors = check_seed(seed)
    except UserError as error:
        return Outcome(seed, "refused", str(error))
    except Exception as error:
        return Outcome(seed, "failed", str(error))
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    if wrong:
        return Outcome(
            seed, "failed", f"errors in parts of those allowed {wrong}\n{draw_case(seed)}"
        )
    return Outcome(seed, "ok")


def run_cases(seeds: list[int]) -> list[Outcome]:
    """Checks cases one after another, in one thread."""
    torch.set_num_threads(1)
    return [run_case(seed) for seed in seeds]


def outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    """Outcomes of all seeds, from `jobs` processes. A case that ends its process or hangs fails."""
    batches = [list(seeds[i : i + BATCH]) for i in range(0, len(seeds), BATCH)]
    while batches:
        lost: list[list[int]] = []
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [(batch, pool.submit(run_cases, batch)) for batch in batches]
            for batch, future in futures:
                try:
                    yield from future.result(SECONDS * len(batch) * jobs)
                except (BrokenProcessPool, TimeoutError) as error:
                    lost.append(batch)
                    _end(pool)
                    if len(batch) == 1:
                        lost.pop()
                        reason = (
                            "it hangs" if isinstance(error, TimeoutError) else "its process died"
                        )
                        yield Outcome(batch[0], "failed", f"{reason}\n{draw_case(batch[0])}")
        batches, jobs = [[seed] for batch in lost for seed in batch], 1


def _end(pool: ProcessPoolExecutor) -> None:
    """Ends the processes of a pool, whatever they are doing."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def report(seeds: range, jobs: int) -> int:
    """Runs all seeds and prints what happens; returns the exit code."""
    print(f"cases of the seeds {seeds[0]} to {seeds[-1]}, torch {torch.__version__}", flush=True)
    counts, began = Counter(), time.monotonic()
    for outcome in outcomes(seeds, jobs):
        counts[outcome.status] += 1
        if outcome.status == "failed":
            print(f"seed {outcome.seed} failed: {outcome.message}")
            print(f"  repeat: python -m tests.fuzz --case {outcome.seed}", flush=True)
        done = counts.total()
        if done % 100 == 0 or done == len(seeds):
            seconds = time.monotonic() - began
            print(f"{done} of {len(seeds)}: {dict(counts)}, {seconds:.0f} s", flush=True)
    share = counts["refused"] / len(seeds)
    if share > MOST_REFUSED and len(seeds) > BATCH:
        print(f"{share:.0%} of the cases were refused, more than {MOST_REFUSED:.0%}")
        return 1
    return int(counts["failed"] > 0)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="draws other cases (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--case", type=int, help="repeats the case of this seed")
    args = parser.parse_args()
    if args.case is not None:
        print(draw_case(args.case), flush=True)
        outcome = run_case(args.case)
        print(" ".join((outcome.status, outcome.message)))
        return int(outcome.status == "failed")
    if not 1 <= args.cases <= PER_SEED or args.seed < 0 or args.jobs < 1:
        parser.error(f"--cases is 1 to {PER_SEED}, --seed at least 0, --jobs at least 1")
    first = args.seed * PER_SEED
    return report(range(first, first + args.cases), args.jobs)


if __name__ == "__main__":
    sys.exit(main())
