"""What one rank computes and copies: matrix products, attention, memory.

All ranks measure at once, as in training: ranks that share a host's memory or power show it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.cost.kernel_time import flops_per_pair
from ringattn.executor import forward_home
from ringattn.launch.doctor_wait import finish
from ringattn.plan import Plan
from ringattn.schedule import Direction

SLOW = 0.8  # of the median rank: below it a rank is named
HIGHER_IS_BETTER = ("gemm_bf16_tflops", "gemm_fp32_tflops", "forward_tflops", "backward_tflops",
                    "memory_gbs", "to_device_gbs", "to_host_gbs")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """Sizes of what is measured: rows of square matrices, tokens and heads of attention, bytes of
    copies; seconds that each measurement may take after its first call."""

    gemm: dict[torch.dtype, int]
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    copy: int
    host_copy: int
    budget: float


def work_for(device: torch.device, quick: bool) -> Work:
    """Sizes that a device is busy with for milliseconds."""
    if device.type == "cuda":
        return Work(
            gemm={torch.bfloat16: 8192, torch.float32: 4096},
            tokens=8192 if quick else 16384,
            heads=(16, 4),
            head_dim=128,
            dtype=torch.bfloat16,
            copy=1 << 30,
            host_copy=256 << 20,
            budget=0.1 if quick else 0.5,
        )
    return Work(
        gemm={torch.bfloat16: 256, torch.float32: 512},
        tokens=512 if quick else 1024,
        heads=(4, 2),
        head_dim=64,
        dtype=torch.float32,
        copy=16 << 20 if quick else 64 << 20,
        host_copy=0,
        budget=0.05 if quick else 0.3,
    )


class Stopwatch:
    """Times calls on a device.

    Args:
        budget: seconds of measuring after the first call. timeout: seconds that a call may take.
    """

    def __init__(self, device: torch.device, budget: float, timeout: float) -> None:
        self.device, self.budget, self.timeout = device, budget, timeout

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call: the best of three batches, after two calls that do not count.

        Raises:
            TimeoutError: the device hangs.
        """
        self._batch(call, 1)
        once = self._batch(call, 1)
        count = max(1, min(50, int(self.budget / 3 / max(once, 1e-6))))
        return min(self._batch(call, count) for _ in range(3))

    def _batch(self, call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        finish(self.device, time.monotonic() + self.timeout)
        return (time.perf_counter() - start) / count


def measure_rates(device: torch.device, work: Work, staged: str | None, timeout: float) -> dict:
    """Rates of this rank, as JSON holds them. No communication with other ranks.

    Args:
        staged: as in `ContextParallel`; the group of one rank sends nothing.

    Returns:
        gemm_bf16_tflops, gemm_fp32_tflops; forward_tflops and backward_tflops of causal attention,
        counting the pairs that the mask allows; kernel, backward_kernel: their names; seconds of
        both directions; memory_gbs: bytes read and written by a copy; to_device_gbs and to_host_gbs
        of a GPU.
    """
    watch = Stopwatch(device, work.budget, timeout)
    found: dict[str, Any] = {}
    for dtype, size in work.gemm.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        seconds = watch.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        found[f"gemm_{name}_tflops"] = 2 * size**3 / seconds / 1e12
    found |= _attention(watch, work, staged, timeout)
    found |= _copies(watch, work)
    return found


def attention_plan(work: Work, group: dist.ProcessGroup | int, staged: str | None) -> Plan:
    """The plan of the measured attention, over a group of one rank or one simulated rank."""
    context = ra.ContextParallel(
        group,
        heads=work.heads,
        head_dim=work.head_dim,
        dtype=work.dtype,
        method="ring",
        layout="contiguous",
        staged=staged,
    )
    return context.plan(ra.masks.causal(work.tokens))


def _attention(watch: Stopwatch, work: Work, staged: str | None, timeout: float) -> dict[str, Any]:
    """Rates of the kernels that are chosen for causal attention."""
    group = dist.new_group(
        [dist.get_rank()], timeout=timedelta(seconds=timeout), use_local_synchronization=True
    )
    assert isinstance(group, dist.ProcessGroup)
    plan = attention_plan(work, group, staged)
    shapes = ((h, work.head_dim) for h in (work.heads[0], *[work.heads[1]] * 2, work.heads[0]))
    q, k, v, dout = (
        torch.randn(1, work.tokens, *shape, device=watch.device).to(work.dtype) for shape in shapes
    )
    with torch.no_grad():
        forward = watch.seconds(lambda: ra.attention(q, k, v, plan))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ra.attention(q, k, v, plan)
    backward = watch.seconds(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    found: dict[str, Any] = {}
    times: dict[Direction, float] = {"forward": forward, "backward": backward}
    for direction, seconds in times.items():
        schedule = plan.schedule(direction)
        flops = plan.mask.area * work.heads[0] * flops_per_pair(schedule)
        found[f"{direction}_tflops"] = flops / seconds / 1e12
        found[f"{direction}_seconds"] = seconds
    home = forward_home(q, k, v, None)
    found["kernel"] = plan.chosen_program("forward", 0, home, None).kernel.name
    found["backward_kernel"] = plan.chosen_program("backward", 0, home, None).kernel.name
    return found


def _copies(watch: Stopwatch, work: Work) -> dict[str, float]:
    """Rates of copies on the device, and between a GPU and page-locked host memory."""
    a = torch.zeros(work.copy, dtype=torch.uint8, device=watch.device)
    b = torch.zeros_like(a)
    found = {"memory_gbs": 2 * work.copy / watch.seconds(lambda: b.copy_(a)) / 1e9}
    if work.host_copy and watch.device.type == "cuda":
        host = torch.zeros(work.host_copy, dtype=torch.uint8, pin_memory=True)
        part = a[: work.host_copy]
        for name, target, source in (("to_device", part, host), ("to_host", host, part)):
            seconds = watch.seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True))
            found[f"{name}_gbs"] = work.host_copy / seconds / 1e9
    return found


def name_slow(rates: Sequence[dict[str, Any]], hosts: Sequence[str]) -> list[str]:
    """One line for each rank whose rate lies below `SLOW` times the median of all ranks."""
    lines = []
    for name in HIGHER_IS_BETTER:
        values = [mine[name] for mine in rates if name in mine]
        middle = statistics.median(values) if values else 0.0
        lines += [
            f"rank {rank} (host {hosts[rank]}): {name} {mine[name]:.3g}, the median is {middle:.3g}"
            for rank, mine in enumerate(rates)
            if name in mine and mine[name] < SLOW * middle
        ]
    return lines
