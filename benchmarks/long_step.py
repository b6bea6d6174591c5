"""One GPU and a million tokens: the longest step that fits, its speed, and plain PyTorch beside it.

    python -m ringattn.benchmarks.long_step [--minutes 9] [--models 1b 8b] [--parts longest ...]

Every case is one or two whole training steps (forward, backward, clipping, AdamW) of a Llama shape
on random tokens, in a process of its own, so that one that runs out of memory leaves nothing
behind. Parts:

longest     doubling lengths at full depth, every layer under a 4,096-token window: what is kept is
            as under a causal mask, at a fraction of the time. Ours, and plain PyTorch under a
            causal mask: SDPA, full checkpointing, logits of all tokens.
throughput  two layers, causal, at the longest length that each model reached
mfu         the whole model, causal, at 128K and 256K tokens

Records: seconds of the second step, peak bytes of the device and of pinned host memory, TFLOP/s by
model operations (recomputation not counted), MFU where the GPU's peak is known. A length that does
not fit is recorded as refused. Cases that have a record are not run again. Without a GPU a tiny
model runs on the CPU: a check of this script, not a result.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ringattn.benchmarks.long_step_run import OUT_OF_MEMORY, run_case
from ringattn.benchmarks.record import Recorder, read_records, refused
from ringattn.errors import UserError

NAME = "long_step"
PARTS = ("longest", "throughput", "mfu")
WINDOW = 4096
LENGTHS = tuple(1024 * 2**n for n in range(5, 12))  # 32K to 2M
LEAST_GAIN = 4.0  # times the longest sequence of plain PyTorch
LEAST_MFU = 0.45


@dataclass(frozen=True, kw_only=True)
class Case:
    """One process.

    Attributes:
        part: of `PARTS`. model: size's name. tokens: of the step. layers: null for all.
        window: of every layer, null for causal.
        plain: PyTorch's own means in place of ours.
    """

    part: str
    model: str
    tokens: int
    layers: int | None = None
    window: int | None = None
    plain: bool = False

    @property
    def name(self) -> str:
        """Unique among the records."""
        depth = "" if self.layers is None else f"-{self.layers}layers"
        mask = "causal" if self.window is None else f"window{self.window}"
        who = "plain" if self.plain else "ours"
        return f"{self.part}-{self.model}{depth}-{self.tokens}-{mask}-{who}"


def cases(part: str, models: Sequence[str], recorder: Recorder) -> Iterator[Case]:
    """The cases of a part, made as earlier ones end: lengths grow until one does not fit."""
    for model in models:
        if part == "longest":
            for plain in (True, False):
                for tokens in LENGTHS:
                    window = None if plain else WINDOW
                    case = Case(part=part, model=model, tokens=tokens, window=window, plain=plain)
                    yield case
                    if case.name not in _fitting(recorder):
                        break
        elif part == "throughput":
            reached = longest(recorder, model, plain=False)
            if reached:
                yield Case(part=part, model=model, tokens=reached, layers=2)
        else:
            yield from (Case(part=part, model=model, tokens=n << 10) for n in (128, 256))


def longest(recorder: Recorder, model: str, *, plain: bool) -> int:
    """Most tokens of a step that fitted, 0 if none did."""
    start, end = f"longest-{model}-", "plain" if plain else "ours"
    lengths = [
        int(name.removeprefix(start).split("-")[0])
        for name in _fitting(recorder)
        if name.startswith(start) and name.endswith(end)
    ]
    return max(lengths, default=0)


def _fitting(recorder: Recorder) -> set[str]:
    records = read_records(recorder.path)
    return {r.case for r in records if r.name == NAME and r.status == "ok"}


def measure(case: Case, recorder: Recorder, seconds: float) -> str:
    """Runs a case in a process, records it, and returns its line."""
    command = [sys.executable, "-m", "ringattn.benchmarks.long_step", "--case"]
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(case))], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"{case.name}: not done within {seconds:.0f} s, not recorded"
    if done.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):  # of the device, of the host
        recorder.refused(NAME, case.name, "s", "out of memory", config=asdict(case))
        return f"{case.name}: out of memory"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        recorder.error(NAME, case.name, "s", lines[-1], config=asdict(case))
        return f"{case.name}: {lines[-1]}"
    found = json.loads(done.stdout.splitlines()[-1])
    recorder.ok(NAME, case.name, found["step_s"], "s", config={**asdict(case), **found})
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    return (
        f"{case.name}: {found['step_s']:.2f} s, {found['tflops']:.0f} TFLOP/s{mfu}, "
        f"peak {found['peak_bytes'] / 2**30:.1f} GiB, host {found['host_bytes'] / 2**30:.1f} GiB"
    )


def summary(recorder: Recorder, models: Sequence[str]) -> Iterator[str]:
    """The bars."""
    for model in models:
        ours, plain = (longest(recorder, model, plain=p) for p in (False, True))
        gain = f"{ours / plain:.1f} × plain PyTorch's {plain:,}" if plain else "plain: none fitted"
        yield f"{model}: longest step {ours:,} tokens, {gain} (bar {LEAST_GAIN:g} ×)"
    for record in read_records(recorder.path):
        if record.case.startswith("mfu-") and record.config.get("mfu"):
            yield f"{record.case}: MFU {record.config['mfu']:.1%} (bar {LEAST_MFU:.0%})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all cases together")
    parser.add_argument("--models", nargs="+", default=["1b", "8b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", default="benchmarks/results/long_step.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        sys.exit(run_case(**json.loads(args.case)))
    recorder, end = Recorder(Path(args.out)), time.monotonic() + 60 * args.minutes
    if not torch.cuda.is_available():
        for plain in (False, True):
            small = Case(part="mfu", model="debug", tokens=512, plain=plain)
            run_case(**asdict(small))
        return
    for part in args.parts:
        for case in cases(part, args.models, recorder):
            if recorder.has(NAME, case.name):
                continue
            left = end - time.monotonic()
            if left < 20:
                refused(UserError("--minutes", "the time is over", "run it again: it goes on"))
            print(measure(case, recorder, left), flush=True)
    print("\n".join(summary(recorder, args.models)))


if __name__ == "__main__":
    main()
