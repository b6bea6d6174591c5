"""Everything worth running on a GPU, in order and within a time: check, tune, kernels, one rank.

    python -m ringattn.benchmarks.gpu_session [--minutes 9] [--stages check tune kernels one_rank]

Each stage is a process of its own with a share of the time that is left, ended when the share is
over; what it leaves unused goes to the stages after it, and a failing stage does not stop them.
Output goes to gpu_<stage>.log in `--out`, beside the records. `tune` and `kernels` go on where an
earlier session stopped; when one loses the device's context, it is started again. The last lines
say of each stage whether it passed, how long it took, and what it wrote. Exits with 1 when one
failed.

check    every kernel on every mask at 2K against the reference, then the tests marked gpu
tune     block sizes of the band kernel, written over the shipped table
kernels  the headline subset of the kernel benchmark
one_rank one rank of 64 at the network's pace
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ringattn.benchmarks.kernel_measure import LOST
from ringattn.benchmarks.record import read_records, refused
from ringattn.benchmarks.session_process import ended, run_to_end
from ringattn.errors import UserError
from ringattn.kernels import kernel_names

SHARES = {"check": 0.35, "tune": 0.25, "kernels": 0.25, "one_rank": 0.15}
RESERVE = 8.0  # seconds at the end, for ending processes and the summary
MARGIN = 30.0  # seconds before its hard end at which a step is asked to stop by itself
LEAST = 5.0  # seconds; a step with fewer is not started
Command = list[str]


@dataclass(frozen=True)
class Step:
    """One process of a stage.

    Attributes:
        command: from the seconds that it should take. share: of the stage's time.
        again: whether it goes on when started again after the device's context was lost.
        wrote: what holds its results, in the session's folder.
        judge: says what is wrong with the results, or ''.
    """

    command: Callable[[float], Command]
    share: float = 1.0
    again: bool = False
    wrote: Path | None = None
    judge: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a stage. reason: '' where it passed."""

    stage: str
    reason: str
    seconds: float
    wrote: tuple[Path, ...]

    def line(self) -> str:
        """A row of the summary."""
        state = "passed" if not self.reason else "FAILED"
        files = ", ".join(str(p) for p in self.wrote) or "nothing"
        return f"{self.stage:9} {state:7} {self.seconds:6.0f} s  {files}  {self.reason}".rstrip()


def stages(out: Path) -> dict[str, list[Step]]:
    """The steps of every stage, with results in a folder."""
    quick = [name for name in kernel_names() if name not in ("cpu_flash", "flex")]
    smoke, tuned, measured = (out / f"{n}.jsonl" for n in ("gpu_smoke", "triton_tune", "kernels"))
    ranks = out / "one_rank.jsonl"
    tests = [sys.executable, "-u", "-m", "pytest", "-v", "-m", "gpu", "--maxfail=10"]
    # Most of their time goes into compiling, on one core each.
    tests += ["-n", "8"] if find_spec("xdist") else []
    band = "tests/kernels/test_triton_gpu.py"
    return {
        "check": [
            # FlexAttention compiles for each mask: it comes last, and may not get far.
            Step(lambda s: _smoke(smoke, quick, s), 0.35, True, smoke, errors_in),
            Step(lambda s: [*tests, band], 0.35),
            Step(lambda s: [*tests, f"--ignore={band}", "tests"], 0.2),
            Step(lambda s: _smoke(smoke, ["flex"], s), 0.1, True, smoke, errors_in),
        ],
        "tune": [
            Step(
                lambda s: _module("triton_tune", "--minutes", s / 60, "--out", tuned, "--write"),
                again=True, wrote=tuned,
            )
        ],
        "kernels": [
            Step(
                lambda s: _module(
                    "kernels", "--subset", "headline", "--minutes", s / 60, "--out", measured
                ),
                again=True, wrote=measured, judge=errors_in,
            )
        ],
        "one_rank": [
            Step(lambda s: _module("one_rank", "--seconds", s, "--out", ranks), wrote=ranks)
        ],
    }  # fmt: skip


def _smoke(out: Path, kernels: Sequence[str], seconds: float) -> Command:
    return _module(
        "kernels", "--subset", "all", "--lengths", 2048, "--heads", "16:2", "--head-dims", 128,
        "--seconds", 0.001, "--minutes", seconds / 60, "--out", out, "--kernels", *kernels,
    )  # fmt: skip


def _module(name: str, *arguments: object) -> Command:
    return [sys.executable, "-u", "-m", f"ringattn.benchmarks.{name}", *map(str, arguments)]


def errors_in(path: Path) -> str:
    """How many records of a file are errors, and the first, or ''."""
    records = read_records(path)
    if not records:
        return "nothing was measured"
    wrong = [r for r in records if r.status == "error"]
    if not wrong:
        return ""
    return f"{len(wrong)} of {len(records)} are errors: {wrong[0].case}: {wrong[0].reason}"


def run_stage(name: str, steps: Sequence[Step], seconds: float, out: Path) -> Outcome:
    """Runs the steps of a stage, each to the end of its share of what is left."""
    begin, log = time.monotonic(), out / f"gpu_{name}.log"
    log.unlink(missing_ok=True)
    faults: list[str] = []
    for number, step in enumerate(steps):
        left = seconds - (time.monotonic() - begin)
        share = left * step.share / sum(s.share for s in steps[number:])
        reason = _run_step(step, share, log)
        if not reason and step.judge and step.wrote:
            reason = step.judge(step.wrote)
        faults += [reason] if reason else []
    wrote = dict.fromkeys([log, *(s.wrote for s in steps if s.wrote and s.wrote.exists())])
    return Outcome(name, "; ".join(dict.fromkeys(faults)), time.monotonic() - begin, tuple(wrote))


def _run_step(step: Step, seconds: float, log: Path) -> str:
    """Why the step failed, or ''."""
    end = time.monotonic() + seconds
    reason = "no time was left"
    while (left := end - time.monotonic()) > LEAST:
        status = run_to_end(step.command(left - min(MARGIN, left / 3)), left, log)
        if not (step.again and status == LOST):
            return ended(status)
        reason = "the device's context was lost until the time was over"
    return reason


def run(names: Sequence[str], minutes: float, out: Path) -> list[Outcome]:
    """Runs stages in order within the time, and prints the summary."""
    end = time.monotonic() + 60 * minutes - RESERVE
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_smoke.jsonl").unlink(missing_ok=True)  # says what this code does, not older code
    known, outcomes = stages(out), []
    for number, name in enumerate(names):
        left = end - time.monotonic()
        seconds = left * SHARES[name] / sum(SHARES[n] for n in names[number:])
        print(f"{name}: at most {seconds:.0f} s, see {out / f'gpu_{name}.log'}", flush=True)
        outcomes.append(run_stage(name, known[name], seconds, out))
    print("\n".join(outcome.line() for outcome in outcomes), flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all stages together")
    parser.add_argument("--stages", nargs="+", choices=tuple(SHARES), default=tuple(SHARES))
    parser.add_argument("--out", default="benchmarks/results", help="folder of records and logs")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        rule = "a GPU session needs a CUDA device"
        refused(UserError("device=cpu", rule, "use a machine with one"))
    names = [name for name in SHARES if name in args.stages]
    sys.exit(any(o.reason for o in run(names, args.minutes, Path(args.out))))


if __name__ == "__main__":
    main()
