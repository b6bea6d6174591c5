"""What executor and messages cost on a CPU: real plans over the real group, a stand-in for kernels.

Each rank times its own thread and, as the rest of the process, the threads that carry messages.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

import ringattn as ra
from ringattn.cost.survey import Survey, survey
from ringattn.executor import Slots
from ringattn.kernels.base import Kernel
from ringattn.kernels.block_matrix import BlockTiles
from ringattn.masks import Mask
from ringattn.plan import Plan
from ringattn.program import Program, build_program
from ringattn.schedule import Direction

COUNTS = ("run", "made", "steps", "posted", "parts", "copied", "added", "ends", "moved")
"""What a direction's time is made of on a rank: one run; bytes of accumulators; steps; messages
posted; runs of rows copied; bytes copied and added; message ends carried and their bytes."""


class BusyKernel:
    """Keeps its thread busy with products and counts how long: what a kernel does to caches and to
    the threads beside it, in a known time. Implements `ringattn.kernels.base.Kernel`.

    Attributes:
        seconds: CPU time of this thread spent so far. Each launch takes `launch` seconds.
    """

    name = "busy"
    reads_around = False

    def __init__(self, launch: float) -> None:
        self.launch, self.seconds = launch, 0.0
        self._operands = torch.ones(256, 256), torch.ones(256, 256), torch.empty(256, 256)

    def refusal(self, **_: object) -> str | None:
        """Refuses nothing."""
        return None

    def prepare(
        self, tiles: np.ndarray, device: torch.device, blocks: BlockTiles | None = None
    ) -> None:
        """Prepares nothing."""

    def forward(self, *_: object, **__: object) -> None:
        """Leaves results as they are."""
        start = time.thread_time()
        a, b, out = self._operands
        while (passed := time.thread_time() - start) < self.launch:
            torch.mm(a, b, out=out)
        self.seconds += passed

    def backward(self, *_: object, **__: object) -> None:
        """Leaves results as they are."""
        self.forward()


class BusyPlan(Plan):
    """A plan that moves everything and computes nothing of use."""

    busy: BusyKernel

    def chosen_program(
        self, direction: Direction, rank: int, home: Slots, softcap: float | None
    ) -> Program:
        """See `Plan.chosen_program`."""
        key = (direction, rank, "busy", "cpu")
        if key not in self._programs:
            kernel = cast("Kernel", self.busy)
            schedule = self.schedule(direction)
            self._programs[key] = build_program(schedule, rank, kernel, torch.device("cpu"))
        return self._programs[key]


@dataclass(frozen=True, kw_only=True)
class ExecutorWork:
    """Heads, head dim and dtype of the plans, tokens of a rank, how often each runs, and seconds
    that a launch keeps a rank busy."""

    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    tokens: tuple[int, ...] = (96, 700)
    passes: int = 5
    launch: float = 3e-3


def probe_plans(work: ExecutorWork, world: int) -> Iterator[BusyPlan]:
    """Plans of several methods: those that the number of ranks allows."""
    for tokens in work.tokens:
        size = tokens * world
        masks: list[Mask] = [ra.masks.causal(size), ra.masks.sliding_window(size, size // 3, 0)]
        for method in ("ring", "burst", "all_gather", "tile", "ulysses", "usp"):
            for mask in masks:
                try:
                    context = ra.ContextParallel(
                        None, heads=work.heads, head_dim=work.head_dim, dtype=work.dtype,
                        method=method, layout="zigzag",
                    )  # fmt: skip
                    plan = context.plan(mask)
                except ra.UserError:
                    continue
                schedules = plan.forward, plan.backward
                busy = BusyPlan(context, mask, plan.layout, method, schedules)
                busy.busy = BusyKernel(work.launch)
                yield busy


def measure_executor(work: ExecutorWork, world: int, rank: int) -> dict[str, Any]:
    """Times busy plans. Every rank of the default group calls it; they communicate.

    Returns:
        rows: for each plan and direction the `COUNTS`, CPU seconds of this rank's own thread, and
        of its other threads; medians.

    Raises:
        CommunicationError: a peer did not answer.
    """
    rows = [row for plan in probe_plans(work, world) for row in _probe(plan, work, rank)]
    return {"rows": rows}


def _probe(plan: BusyPlan, work: ExecutorWork, rank: int) -> list[list[float]]:
    size = int(plan.layout.sizes[rank])
    heads = (work.heads[0], work.heads[1], work.heads[1], work.heads[0])
    q, k, v, dout = (torch.zeros(1, size, h, work.head_dim).to(work.dtype) for h in heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    times: list[list[tuple[float, float]]] = [[], []]
    for number in range(work.passes + 1):
        start = _clocks(plan.busy)
        out = ra.attention(q, k, v, plan)
        middle = _clocks(plan.busy)
        torch.autograd.grad(out, leaves, dout)
        end = _clocks(plan.busy)
        if number:  # the first pass opens connections and compares plans
            times[0].append((middle[0] - start[0], middle[1] - start[1]))
            times[1].append((end[0] - middle[0], end[1] - middle[1]))
    counts = [
        direction_counts(survey(plan.schedule(d), 1, 1, host=True), rank)
        for d in ("forward", "backward")
    ]
    rows = []
    for mine, found in zip(counts, times, strict=True):
        own, all_threads = (statistics.median(each) for each in zip(*found, strict=True))
        rows.append([*mine, own, max(all_threads - own, 0.0)])
    return rows


def _clocks(kernel: BusyKernel) -> tuple[float, float]:
    """CPU seconds of this thread and of the process, without the kernel's."""
    return time.thread_time() - kernel.seconds, time.process_time() - kernel.seconds


def direction_counts(counts: Survey, rank: int) -> list[float]:
    """`COUNTS` of one direction on a rank; `counts` were surveyed with `host`."""
    work, messages = counts.host, counts.messages
    assert work is not None
    mine = (messages.src == rank) | (messages.dst == rank)

    def total(*tables: np.ndarray) -> float:
        return float(sum(table[:, rank].sum() for table in tables))

    return [
        1.0,
        float(work.made[rank]),
        float(counts.nsteps),
        total(work.posted),
        total(work.packed_parts, work.landed_parts),
        total(work.packed, work.written),
        total(work.added),
        float(mine.sum()),
        float(messages.nbytes[mine].sum()),
    ]
