"""Finds the band kernel's block sizes on this GPU.

    python -m ringattn.benchmarks.triton_tune [--minutes 8] [--parts forward keys] [--dims 128]
    python -m ringattn.benchmarks.triton_tune --minutes 0 --write   # writes what was found before

For every kernel, head dim, dtype, softcap, and columns in runs or listed, most wanted first: the
shipped configuration and those most like it are compiled on all cores but two, while the GPU times
the ones that compiled well. What spills, has its matrix instructions serialized or exceeds a limit
is left out; the rest is held to the matmul kernel's result, then timed on masks of 16K tokens,
three for columns in runs and two for listed columns. The score is the geometric mean of TFLOP/s.
Everything tried is in the records at once: the command stops when time is up and goes on when run
again. Records of other device code or another Triton do not count.

The table with the best so far is written beside the records, and over the shipped one with --write.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch

from ringattn.benchmarks.kernel_measure import LOST
from ringattn.benchmarks.record import refused
from ringattn.benchmarks.triton_compile import PARTS, Resources, Variant, compiled
from ringattn.benchmarks.tune_cases import (
    DIMS,
    Entry,
    as_text,
    candidates,
    entries,
    fault,
    shipped,
)
from ringattn.benchmarks.tune_measure import CAP, LISTS, RUNS, Workbench, WrongResult
from ringattn.benchmarks.tune_records import Log, choose
from ringattn.benchmarks.tune_table import merged, read_table, table_text
from ringattn.errors import UserError
from ringattn.kernels import triton_configs
from ringattn.kernels.measured import architecture_of
from ringattn.kernels.triton_configs import SHIPPED, BlockConfig
from ringattn.kernels.triton_launch import interpreted

TABLE = Path(triton_configs.__file__).with_name(SHIPPED)
COMPILE_SECONDS = 90.0  # a compiler that takes longer has hung or died
HOPELESS = 0.6  # of the best on the first mask: the other masks are not timed

Rate = Callable[[Entry, str, BlockConfig], float]
Submit = Callable[[Variant], "AsyncResult[Resources | str]"]


def attempt(variant: Variant) -> Resources | str:
    """What a variant uses, or why it does not compile. Runs in a process of the pool."""
    try:
        return compiled(variant)
    except Exception as error:  # whatever the compiler raises is a result here
        text = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {text}"[:200]


@dataclass(frozen=True)
class Search:
    """The search of one run.

    Attributes:
        log: what was tried. deadline: of time.monotonic(). most: configurations of an entry.
        submit: starts to compile a variant. rate: TFLOP/s of a configuration on a mask.
    """

    log: Log
    deadline: float
    most: int
    submit: Submit
    rate: Rate
    best_first: dict[Entry, float] = field(default_factory=dict)

    def run(self, wanted: Sequence[Entry]) -> bool:
        """Tries what was not tried yet; whether everything was."""
        todo = {entry: self._todo(entry) for entry in wanted}
        pending = {
            (entry, config): [self.submit(v) for v in entry.variants(self.log.arch, config)]
            for entry, configs in todo.items()
            for config in configs
        }
        print(f"{len(pending)} configurations of {len(wanted)} kernels to try", flush=True)
        for number, ((entry, config), results) in enumerate(pending.items(), start=1):
            if time.monotonic() >= self.deadline:
                left = len(pending) - number + 1
                print(f"time is up, {left} configurations are left: run it again to go on")
                return False
            said = self._try(entry, config, results)
            print(f"[{number}/{len(pending)}] {entry!s:26} {as_text(config):20} {said}", flush=True)
        return True

    def _todo(self, entry: Entry) -> list[BlockConfig]:
        made = candidates(entry, self.log.arch, self.most)
        return [config for config in made if not self.log.has(entry, config)]

    def _try(self, entry: Entry, config: BlockConfig, results: list) -> str:
        """Tries one configuration, records the outcome, and says it in a few words."""
        end = min(self.deadline, time.monotonic() + COMPILE_SECONDS)
        try:
            used = [result.get(max(0.0, end - time.monotonic())) for result in results]
        except multiprocessing.TimeoutError:
            return "has not compiled in time, not recorded"
        reason = fault(entry.variants(self.log.arch, config), used)
        if reason:
            self.log.left_out(entry, config, "refused", reason)
            return reason
        self.log.begin(entry, config)
        try:
            return self._timed(entry, config)
        except WrongResult as error:
            self.log.left_out(entry, config, "error", f"wrong result: {error}")
            return f"wrong result: {error}"
        except Exception as error:  # whatever a launch raises is a result of this search
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message')[:200]}"
            self.log.left_out(entry, config, "error", reason)
            _require_context()
            return reason
        finally:
            self.log.done()

    def _timed(self, entry: Entry, config: BlockConfig) -> str:
        rates: dict[str, float] = {}
        masks = LISTS if entry.listed else RUNS
        for mask in masks:
            rates[mask] = self.rate(entry, mask, config)
            best = self.best_first.get(entry, 0.0)
            if mask == masks[0] and rates[mask] < HOPELESS * best:
                reason = f"{rates[mask]:.3g} TFLOP/s on {mask}, where another has {best:.3g}"
                self.log.left_out(entry, config, "refused", reason)
                return reason
        self.best_first[entry] = max(self.best_first.get(entry, 0.0), rates[masks[0]])
        value = self.log.rated(entry, config, rates)
        each = ", ".join(f"{rate:.3g}" for rate in rates.values())
        return f"{value:.4g} TFLOP/s ({each})"


def _require_context() -> None:
    """Ends the process where the device's context is lost: all that follows would fail too."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device's context is lost: {str(error).splitlines()[0]}; run it again")
        raise SystemExit(LOST) from None


def found(log: Log) -> dict[Entry, BlockConfig]:
    """The best configuration of every kernel that has figures; prints them beside the shipped."""
    best = {}
    for entry, figures in log.figures().items():
        now = shipped(entry, log.arch)
        best[entry] = choose(figures, now)
        before = f"{figures[now]:.4g}" if now in figures else "no figure"
        print(
            f"{entry!s:26} {as_text(best[entry]):20} {figures[best[entry]]:8.4g} TFLOP/s"
            f"   shipped {as_text(now)} {before}, {len(figures)} timed"
        )
    return best


def write(log: Log, targets: Sequence[Path]) -> None:
    """Writes the shipped table with what was found to files."""
    text = table_text(merged(read_table(TABLE), log.arch, found(log)))
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"{target} written")


def benches(device: torch.device) -> Rate:
    """Times on a device. Keeps the inputs of the two latest shapes."""
    kept: dict[tuple, Workbench] = {}

    def rate(entry: Entry, mask: str, config: BlockConfig) -> float:
        key = (entry.head_dim, entry.itemsize, entry.softcap)
        if key not in kept:
            while len(kept) > 1:
                kept.pop(next(iter(kept)))
            kept[key] = Workbench(
                device=device, head_dim=entry.head_dim,
                dtype=torch.bfloat16 if entry.itemsize == 2 else torch.float32,
                softcap=CAP if entry.softcap else None,
            )  # fmt: skip
        return kept[key].rate(entry.part, mask, config)

    return rate


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(arguments)
    try:
        _run(args)
    except UserError as error:
        refused(error)


def _run(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    if not torch.cuda.is_available():
        raise UserError("device=cpu", "block sizes are found by timing on CUDA", "use a GPU")
    if interpreted():
        raise UserError("TRITON_INTERPRET=1", "nothing is compiled under it", "unset it")
    device, out = torch.device("cuda"), Path(args.out)
    log = Log(out, architecture_of(device))
    wanted = entries(args.parts, args.dims, args.dtypes, [s == "softcap" for s in args.softcaps])
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        submit = partial(_submitted, pool)
        deadline = begin + 60 * args.minutes
        Search(log, deadline, args.candidates, submit, benches(device)).run(wanted)
    write(log, [out.with_suffix(".json"), *([Path(args.write)] if args.write else [])])


def _submitted(pool, variant: Variant) -> "AsyncResult[Resources | str]":
    return pool.apply_async(attempt, (variant,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after; default 8")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dims", nargs="+", type=int, choices=DIMS, default=DIMS)
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument(
        "--softcaps", nargs="+", choices=("plain", "softcap"), default=("plain", "softcap")
    )
    parser.add_argument(
        "--candidates", type=int, default=32, help="of each kernel, those like the shipped first"
    )
    parser.add_argument("--out", default="benchmarks/results/triton_tune.jsonl")
    parser.add_argument(
        "--write", nargs="?", const=str(TABLE), metavar="FILE",
        help="also write the table over the shipped one",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    main()
