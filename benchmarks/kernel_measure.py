"""Times one kernel on one case, forward and backward, and holds its results to the reference.

The kernel runs the launches of the one-rank plan on whole tensors, into float32 accumulators, as
the executor calls it; filling the accumulators and the casts at the end of a pass are not timed.
On CUDA times are between events, and before each repetition a buffer larger than the L2 cache is
written; on the CPU they are CPU time, which a busy machine does not stretch.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.kernel_reference import Reference, Sample, reference
from ringattn.benchmarks.memory_trace import MemoryTrace
from ringattn.benchmarks.peers.base import Tensors
from ringattn.cost.kernel_time import pair_flops
from ringattn.errors import UserError
from ringattn.executor import backward_home, forward_home
from ringattn.kernels.base import Kernel
from ringattn.kernels.block_matrix import Selection
from ringattn.plan import Plan
from ringattn.program import Launch
from ringattn.routing import select_whole
from ringattn.schedule import Channel, Direction
from ringattn.workload import work_of

FLUSH_BYTES = 256 << 20
WARM_UPS, LEAST, MOST = 3, 5, 100  # repetitions before timing, and timed
LONG = 10.0
LOST = 3  # exit status of a command that lost the device's context; a new process can go on
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
OUTPUTS = {"forward": ("out",), "backward": ("dq", "dk", "dv")}
# Relative errors beyond which a result is wrong; of float32 with products in TF32.
WRONG = {"bfloat16": 2e-2, "float16": 1e-2, "float32": 5e-3, "float64": 1e-9}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Repetitions of one pass: seconds of each, and bytes that it held beyond its tensors."""

    seconds: tuple[float, ...]
    workspace_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one direction: ok with figures, or refused or error with a reason."""

    direction: Direction
    status: str
    reason: str = ""
    tflops: float | None = None
    spread: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bench:
    """A case on a device: inputs, plan and reference, shared by all kernels measured on it.

    Inputs are normal, in the case's dtype. `seconds` is about how long the repetitions of one
    kernel and direction take together.
    """

    case: Case
    device: torch.device
    seconds: float = 0.5
    check: bool = True

    @cached_property
    def plan(self) -> Plan:
        """The plan of one rank."""
        context = ra.ContextParallel(
            1, heads=self.case.heads, head_dim=self.case.head_dim, dtype=self._dtype,
            method="ring", layout="contiguous",
        )  # fmt: skip
        return context.plan(self.case.build())

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.case.dtype)

    def refusal(self, kernel: Kernel) -> str | None:
        """Why a kernel cannot run the case, or None; before anything is made for it."""
        return kernel.refusal(
            device=self.device.type, dtype=self._dtype, head_dim=self.case.head_dim, softcap=None
        )

    @cached_property
    def inputs(self) -> Tensors:
        """q, k, v, dout (1, S, heads, D) on the device."""
        (hq, hkv), (qk, e) = self.case.heads, self.case.head_dim
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v, dout = (
            torch.randn(
                1, self.case.seq_len, heads, dim, dtype=self._dtype, device=self.device,
                generator=generator,
            )
            for heads, dim in ((hq, qk), (hkv, qk), (hkv, e), (hq, e))
        )  # fmt: skip
        return q, k, v, dout

    @cached_property
    def selection(self) -> Selection | None:
        """The blocks that a routed mask's queries select; None for other masks."""
        mask = self.case.build()
        if mask.routing is None:
            return None
        return Selection(select_whole(*self.inputs[:2], mask), self.case.heads[0])

    @property
    def scale(self) -> float:
        """1 / sqrt(D of queries and keys)."""
        return self.case.head_dim[0] ** -0.5

    @cached_property
    def reference(self) -> Reference:
        """Exact results of a sample of rows, keys and heads."""
        sample = Sample.draw(self.case.seq_len, self.case.heads, seed=0)
        return reference(self.case.build(), *self.inputs, self.scale, sample)

    def flops(self, direction: Direction) -> float:
        """FLOPs by exact area."""
        mask = self.case.build()
        pairs = mask.area * self.case.heads[0] / mask.layers
        return pairs * pair_flops(self.plan.forward.shapes, direction)

    def config(self, direction: Direction) -> dict[str, Any]:
        """The parameters of a direction, for its record."""
        work = work_of(self.plan.schedule(direction), 0)
        assert work is not None
        mask = self.case.build()
        return {
            **asdict(self.case),
            "direction": direction,
            "area": mask.area,
            "tiles": len(self.plan.schedule(direction).tasks),
            "flops": self.flops(direction),
            "work": asdict(work),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }

    def measure(self, kernel: Kernel, directions: tuple[Direction, ...]) -> Iterator[Outcome]:
        """Runs a kernel and yields an outcome for each direction; never raises for the kernel.

        The forward always runs: the backward starts from its out and lse. The kernel must not
        refuse the case, see `refusal`.
        """
        left = list(directions)
        try:
            results = self._forward(kernel, timed="forward" in directions)
            if "forward" in directions:
                yield self._outcome("forward", *results)
                left.remove("forward")
            if "backward" in directions:
                out, lse = results[0]["out"], results[3]
                yield self._outcome("backward", *self._backward(kernel, out, lse))
        except UserError as error:
            yield from (Outcome(direction=d, status="refused", reason=str(error)) for d in left)
        except Exception as error:  # whatever a library raises is a result of this benchmark
            text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:300]
            yield from (Outcome(direction=d, status="error", reason=text) for d in left)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _launches(self, kernel: Kernel, direction: Direction) -> tuple[list[Launch], float]:
        """The launches of the plan, and seconds to prepare them."""
        start = time.perf_counter()
        program = self.plan.program(direction, 0, kernel.name, self.device)
        return [la for step in program.steps for la in step.launches], time.perf_counter() - start

    def _forward(self, kernel: Kernel, timed: bool) -> tuple[dict, Timing | None, float, Any]:
        q, k, v, _ = self.inputs
        launches, prepare = self._launches(kernel, "forward")
        out, lse = forward_home(q, k, v, None)[Channel.O, 0]

        def reset() -> None:
            out.zero_()
            lse.fill_(-torch.inf)

        def run() -> None:
            for launch in launches:
                kernel.forward(
                    q, k, v, launch.prepared, out, lse,
                    scale=self.scale, softcap=None, selection=self.selection,
                )  # fmt: skip

        timing = timed_passes(run, reset, self.device, self.seconds) if timed else None
        if not timed:
            run()
        return {"out": out.to(q.dtype)}, timing, prepare, lse

    def _backward(
        self, kernel: Kernel, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[dict, Timing, float]:
        q, k, v, dout = self.inputs
        launches, prepare = self._launches(kernel, "backward")
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        del out
        home = backward_home(dout, q, k, v, lse, delta)
        (dq,), (dk, dv) = home[Channel.DQ, 0], home[Channel.DKV, 0]

        def reset() -> None:
            for x in (dq, dk, dv):
                x.zero_()

        def run() -> None:
            for launch in launches:
                kernel.backward(
                    dout, q, k, v, lse, delta, launch.prepared, dq, dk, dv,
                    scale=self.scale, softcap=None, selection=self.selection,
                )  # fmt: skip

        timing = timed_passes(run, reset, self.device, self.seconds)
        return {"dq": dq.to(q.dtype), "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}, timing, prepare

    def _outcome(
        self,
        direction: Direction,
        got: dict,
        timing: Timing | None,
        prepare: float,
        lse: torch.Tensor | None = None,
    ) -> Outcome:
        del lse
        assert timing is not None
        errors = {}
        if self.check:
            errors = {name: self.reference.error(name, value) for name, value in got.items()}
        wrong = {n: e for n, e in errors.items() if not e <= WRONG[self.case.dtype]}
        if wrong:
            text = ", ".join(f"{name} is off by {error:.2g}" for name, error in wrong.items())
            return Outcome(
                direction=direction, status="error", reason=f"wrong result: relative, {text}",
                figures={"errors": {n: str(e) for n, e in errors.items()}},
            )  # fmt: skip
        rates = self.flops(direction) / np.array(timing.seconds) / 1e12
        low, high = np.quantile(rates, [0.25, 0.75])
        figures = {
            "ms": 1e3 * float(np.median(timing.seconds)),
            "repetitions": len(timing.seconds),
            "errors": errors,
            "workspace_bytes": timing.workspace_bytes,
            "peak_bytes": timing.peak_bytes,
            "prepare_ms": 1e3 * prepare,
        }
        return Outcome(
            direction=direction, status="ok", tflops=float(np.median(rates)),
            spread=float(high - low) / 2, figures=figures,
        )  # fmt: skip


def timed_passes(
    run: Callable[[], None], reset: Callable[[], None], device: torch.device, seconds: float
) -> Timing:
    """Times `run`, with `reset` before each repetition, for about so many seconds in all.

    After warm-up there are `LEAST` to `MOST` repetitions; three where one is longer than the time
    given, and one beyond `LONG` seconds. What the last one computed is left in place.
    """
    cuda = device.type == "cuda"
    clock: Callable[[Callable[[], None], Callable[[], None], int], list[float]] = _cpu_seconds
    if cuda:
        clock = partial(_cuda_seconds, torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device))
    reset()
    run()  # may compile, and take memory for it
    before, peak, workspace = 0, None, None
    if cuda:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    (first,) = clock(run, reset, 1)
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
        workspace = peak - before
    else:
        reset()
        workspace = MemoryTrace(device).run(partial(_traced, run)).peaks.get("run", 0)
    if first > seconds:
        found = [first, *(clock(run, reset, 2) if first <= LONG else ())]
    else:
        (*_, warm) = clock(run, reset, WARM_UPS)
        found = clock(run, reset, int(np.clip(seconds / max(warm, 1e-6), LEAST, MOST)))
    return Timing(seconds=tuple(found), workspace_bytes=workspace, peak_bytes=peak)


def _traced(run: Callable[[], None], part: Callable[[str], Any]) -> None:
    with part("run"):
        run()


def _cpu_seconds(run: Callable[[], None], reset: Callable[[], None], count: int) -> list[float]:
    found = []
    for _ in range(count):
        reset()
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return found


def _cuda_seconds(
    flush: torch.Tensor, run: Callable[[], None], reset: Callable[[], None], count: int
) -> list[float]:
    events = []
    for _ in range(count):
        reset()
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]
