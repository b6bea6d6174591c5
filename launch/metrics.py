"""What a run writes about its progress: JSON lines and TensorBoard events.

    metrics.jsonl   one `StepMetrics` per optimizer step
    eval.jsonl      one `EvalMetrics` per evaluation
    tensorboard/    the same numbers

A step is numbered by the optimizer steps done, so the first one is 1, and a checkpoint
``step-000123`` belongs to the line with step 123.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ringattn.errors import UserError
from ringattn.launch.append_file import AppendFile
from ringattn.launch.tensorboard_file import TensorBoardFile
from ringattn.launch.write_policy import WritePolicy

METRICS_FILE, EVAL_FILE = "metrics.jsonl", "eval.jsonl"

# Dense bfloat16 tensor-core peaks, FLOP/s, from the makers' data sheets.
_PEAK_FLOPS = (
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GB200", 2500e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step over all ranks.

    Attributes:
        step: optimizer steps done.
        loss: mean over the step's counted tokens, nats; NaN where nothing was read.
        tokens: tokens read by the step.
        step_s: wall seconds, waiting for data included.
        tokens_per_s: tokens / step_s.
        grad_norm: global L2 norm before clipping; NaN where the step was left out before.
        lr: learning rate of the step.
        mfu: model FLOP/s over the devices' peak; None where the peak is not known.
        degrees: ranks that shared a pack, of each round of the step; None where all packs run on
            ``parallel.cp`` ranks.
        fault: why there was no update, such as "nonfinite: skip"; None where there was one.
        slowest_rank: whose own work took longest; None on one rank, or without work.
        slowest_ratio: its seconds over the median of all ranks.
    """

    step: int
    loss: float
    tokens: int
    step_s: float
    tokens_per_s: float
    grad_norm: float
    lr: float
    mfu: float | None
    degrees: list[int] | None = None
    fault: str | None = None
    slowest_rank: int | None = None
    slowest_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """One evaluation: mean loss in nats over `tokens` counted held-out tokens."""

    step: int
    loss: float
    tokens: int


class MetricsWriter:
    """Appends to the run's metric files; for the one rank that writes.

    JSON has no numbers that are not finite: they become null.

    Lines of steps after `step` are removed first, so that steps stay unique when a run goes on from
    a checkpoint older than its last line.

    Args:
        run_dir: the run's folder.
        step: steps done so far.
        policy: what a failed write means.

    Raises:
        UserError: a file cannot be made.
    """

    def __init__(self, run_dir: Path, step: int, policy: WritePolicy | None = None) -> None:
        self._policy, self._board_name = policy or WritePolicy(), str(run_dir / "tensorboard")
        try:
            self._files = {
                name: _reopen(run_dir / name, step) for name in (METRICS_FILE, EVAL_FILE)
            }
            self._board = TensorBoardFile(run_dir / "tensorboard", step)
        except OSError as error:
            raise UserError(
                f"run.dir={run_dir}", f"cannot be written ({error})", "name a writable folder"
            ) from None

    def write_step(self, metrics: StepMetrics) -> None:
        """Appends one line to metrics.jsonl."""
        self._write(METRICS_FILE, "train", asdict(metrics))

    def write_eval(self, metrics: EvalMetrics) -> None:
        """Appends one line to eval.jsonl."""
        self._write(EVAL_FILE, "heldout", asdict(metrics))

    def close(self) -> None:
        """Closes everything."""
        for file in (*self._files.values(), self._board):
            file.close()

    def _write(self, name: str, group: str, values: dict[str, Any]) -> None:
        file = self._files[name]
        values = {key: _finite(value) for key, value in values.items()}
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        self._try(str(file.path), partial(file.append, line))
        scalars = {
            f"{group}/{key}": value
            for key, value in values.items()
            if key != "step" and isinstance(value, int | float)
        }
        self._try(self._board_name, partial(self._board.write, values["step"], scalars))

    def _try(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._policy.failed(name, error)
        else:
            self._policy.worked(name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file with an integer "step"; a torn last line is left out."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bfloat16 FLOP/s of a known GPU; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_FLOPS if part in name), None)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reopen(path: Path, step: int) -> AppendFile:
    """Opens for appending after removing lines of later steps (by replacing the file whole)."""
    kept = [entry for entry in read_lines(path) if entry["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    os.replace(partial, path)
    return AppendFile(path)
