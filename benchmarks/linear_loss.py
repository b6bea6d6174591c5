"""Output head and loss, forward and backward: time, peak memory and error of four ways.

    python -m ringattn.benchmarks.linear_loss [--out FILE] [--tokens N] [--dim C] [--classes V]

Runs on the GPU where there is one, else on the CPU in under a minute. Contenders take turns within
one run: `naive` (whole logits in the dtype of the inputs, float32 softmax), `checkpointed` (chunks
of rows whose logits the backward computes again), `ringattn` and `torch` (`F.linear_cross_entropy`
with its default options, where torch has it). `--rows` sets the tokens per chunk of the second
and third; on CUDA it is their own default. Time is that of the CPU (all threads), or of CUDA
events, as a ratio to `naive`; memory is the peak of what a step allocates, beyond its inputs and
with its gradients; error is relative to float64, of the loss and of both gradients.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from ringattn.benchmarks.record import Recorder
from ringattn.kernels import linear_cross_entropy

IGNORE = -100
CHUNK = 1 << 26
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OUTPUTS = ("loss", "dhidden", "dweight")


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whole logits."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def checkpointed(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int | None = None
) -> torch.Tensor:
    """Chunks of `CHUNK` logits, computed again in the backward."""
    rows = rows or max(1, CHUNK // len(weight))
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(naive, part, weight, target, use_reentrant=False)
    return total


def torchs_own(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PyTorch's chunked operator with its default options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", ignore_index=IGNORE, options=options
    )


NAMES = ("naive", "checkpointed", "ringattn", "torch")


def contenders(rows: int | None) -> dict[str, Loss]:
    """Loss functions by name; `rows` tokens per chunk where that can be set."""
    losses: tuple[Loss, ...] = (
        naive,
        partial(checkpointed, rows=rows),
        partial(linear_cross_entropy, rows=rows),
        torchs_own,
    )
    return dict(zip(NAMES, losses, strict=True))


def refusal(name: str) -> str | None:
    """Why a contender cannot run here, or None."""
    if name == "torch" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


def step(loss: Loss, inputs: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """[loss, dhidden, dweight]; the gradients of loss * scale."""
    hidden, weight, labels = inputs
    value = loss(hidden, weight, labels)
    return [value.detach(), *torch.autograd.grad(value * scale, [hidden, weight])]


def make_inputs(
    tokens: int, dim: int, classes: int, dtype: torch.dtype, counted: float, device: str
) -> list[torch.Tensor]:
    """Hidden states of unit size, weights that give logits of about 3, labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=generator)
    weight = torch.randn(classes, dim, generator=generator) * (3 / dim**0.5)
    labels = torch.randint(classes, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) >= counted] = IGNORE
    tensors = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return [*tensors, labels.to(device)]


def reference(inputs: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """The same in float64, in chunks of rows."""
    hidden, weight, labels = (x.detach() for x in inputs)
    wide = weight.double().requires_grad_()
    loss, dhidden, dweight = torch.zeros((), dtype=torch.float64), [], torch.zeros_like(wide)
    for part, target in zip(hidden.split(512), labels.split(512), strict=True):
        x = part.double().requires_grad_()
        logits = F.linear(x, wide)
        value = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        dx, dw = torch.autograd.grad(value * scale, [x, wide])
        loss = loss.to(value.device) + value.detach()
        dhidden.append(dx)
        dweight += dw
    return [loss, torch.cat(dhidden), dweight]


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU time of all threads, or time between CUDA events."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Most bytes that `work` holds at once beyond what was there before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded: Any = profiler
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *sizes]).max())


def measure(
    recorder: Recorder, inputs: list[torch.Tensor], case: str, config: dict, repeats: int
) -> None:
    """All contenders on one case: prints a line each and records its figures."""
    device = inputs[0].device.type
    scale = 1 / 1000  # not a power of two: scaling a 16-bit gradient rounds
    exact = reference(inputs, scale)
    works = {
        name: partial(step, loss, inputs, scale)
        for name, loss in contenders(config["rows"]).items()
        if refusal(name) is None
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}  # warms up, too
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    for name in NAMES:
        if name not in works:
            recorder.refused("linear_loss", f"{case}-{name}-time", "ratio", refusal(name) or "")
            continue
        ratios = np.divide(times[name], times["naive"])
        errors = [
            float((got.double() - want).norm() / want.norm())
            for got, want in zip(works[name](), exact, strict=True)
        ]
        median, ms = float(np.median(ratios)), 1e3 * float(np.median(times[name]))
        spread = float(np.subtract(*np.percentile(ratios, [75, 25])) / 2)
        full = config | {"ms": ms, "repeats": repeats}
        key = f"{case}-{name}"
        recorder.ok("linear_loss", f"{key}-time", median, "ratio", spread=spread, config=full)
        recorder.ok("linear_loss", f"{key}-peak", peaks[name], "bytes", config=config)
        for output, error in zip(OUTPUTS, errors, strict=True):
            recorder.ok("linear_loss", f"{key}-{output}", error, "relative error", config=config)
        print(
            f"{key:48} {ms:9.1f} ms {median:5.2f} ± {spread:.2f} {peaks[name] / 2**20:8.0f} MiB  "
            + "  ".join(f"{o} {e:.1e}" for o, e in zip(OUTPUTS, errors, strict=True)),
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", default="benchmarks/results/linear_loss.jsonl")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 2048)
    parser.add_argument("--dim", type=int, default=4096 if cuda else 256)
    parser.add_argument("--classes", type=int, default=128256 if cuda else 16384)
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3)
    parser.add_argument("--rows", type=int, default=None if cuda else 256)
    args = parser.parse_args()
    recorder, device = Recorder(args.out), "cuda" if cuda else "cpu"
    shape = {"tokens": args.tokens, "dim": args.dim, "classes": args.classes}
    for dtype, counted in ((torch.bfloat16, 1.0), (torch.bfloat16, 0.5), (torch.float32, 1.0)):
        inputs = make_inputs(args.tokens, args.dim, args.classes, dtype, counted, device)
        config = {**shape, "dtype": str(dtype)[6:], "counted": counted, "device": device}
        case = "-".join(str(value) for value in config.values())
        measure(recorder, inputs, case, config | {"rows": args.rows}, args.repeats)


if __name__ == "__main__":
    main()
