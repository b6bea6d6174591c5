"""The kernel curve of a CPU: launches of many shapes, timed one by one.

A curve's figures are fitted to them (`ringattn.launch.doctor_fit`). The launches are those of real
plans of a few simulated ranks, so that they accumulate and take slices of heads as plans do.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

import ringattn as ra
from ringattn.arena import Arena
from ringattn.cost.survey import survey
from ringattn.executor import Run, Slots, backward_home, forward_home
from ringattn.kernels.merge import NO_KEY
from ringattn.masks import Mask
from ringattn.parallel.fabric import LocalFabric
from ringattn.plan import Plan
from ringattn.schedule import ACCUMULATORS, Channel, Direction

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")
CUT = "cpu_flash"
COUNTS = ("pairs", "rows", "keys", "tiles", "launches", "masks", "matrix", "products")
"""Counts of a step's launches that its time is made of, as `ringattn.cost.kernel_time.Load`."""


_PAUSE_S = 2e-3
"""Launches of a plan come after waits: what else runs on the core then takes its caches."""


@dataclass(frozen=True, kw_only=True)
class CurveWork:
    """Heads, head dim and dtype of the launches; each is timed once, and more often until
    `seconds` are over."""

    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seconds: float = 8.0


def sample_plans(work: CurveWork) -> list[Plan]:
    """Plans whose launches span what tiles look like: rectangles, triangles, narrow bands, many
    small tiles, slices of heads, blocks."""
    m = ra.masks
    blocks = np.random.default_rng(0).random((12, 12)) < 0.3
    cases: list[tuple[Mask, str, int]] = [
        (m.full(640), "ring", 2),
        (m.full(1536), "all_gather", 2),
        (m.full(512), "ulysses", 4),
        (m.full(2048), "tile", 4),
        (m.causal(1280), "ulysses", 2),
        (m.causal(1792), "ring", 4),
        (m.causal(768), "usp", 4),
        (m.sliding_window(1536, 255, 0), "ulysses", 4),
        (m.sliding_window(1280, 300, 300), "direct", 2),
        (m.documents([40, 200, 30, 600, 70, 20, 130, 90, 100], causal=True), "direct", 2),
        (m.documents([300, 60, 25, 500, 80, 180, 45, 90], causal=False), "ulysses", 4),
        (m.documents([64] * 16, causal=True), "ring", 2),
        (m.prefix_lm(1024, 300), "ring", 2),
        (m.blocks(blocks, 96, 96), "ring", 2),
        (m.blocks(blocks, 128, 128), "ulysses", 4),
    ]
    return [
        ra.ContextParallel(
            world, heads=work.heads, head_dim=work.head_dim, dtype=work.dtype,
            method=method, layout="contiguous", kernel=CUT,
        ).plan(mask)
        for mask, method, world in cases
    ]  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """A step of one rank of a plan: what it computes, and how. `clear` is not timed."""

    direction: Direction
    counts: list[float]
    run: Callable[[], None]
    clear: Callable[[], None]


def measure_curve(work: CurveWork) -> dict[str, Any]:
    """Times launches on this process: CPU time where it has one thread, else wall time.

    Returns:
        By direction a list of rows: the `COUNTS` of a step of a rank, then its median seconds.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples = [s for plan in sample_plans(work) for s in _samples(plan, work)]
    seconds: list[list[float]] = [[] for _ in samples]
    start_of_all, number = time.monotonic(), 0
    while number <= 1 or time.monotonic() - start_of_all < work.seconds:
        for sample, mine in zip(samples, seconds, strict=True):
            sample.clear()
            time.sleep(_PAUSE_S)
            start = clock()
            sample.run()
            if number:  # the first pass warms caches up
                mine.append(clock() - start)
        number += 1
    rows: dict[str, Any] = {direction: [] for direction in DIRECTIONS}
    for sample, mine in zip(samples, seconds, strict=True):
        rows[sample.direction].append([*sample.counts, statistics.median(mine)])
    return rows


def _samples(plan: Plan, work: CurveWork) -> Iterator[_Sample]:
    """Steps with launches of two ranks of a plan, the first and the last."""
    generator = torch.Generator().manual_seed(0)
    for direction in DIRECTIONS:
        load = survey(plan.schedule(direction), 1, 1, cut=CUT).load
        for rank in (0, plan.world - 1):
            home = _home(plan, rank, direction, work, generator)
            program = plan.chosen_program(direction, rank, home, None)
            fabric = LocalFabric.group(plan.world)[rank]
            run = Run(program, fabric, Arena(), home, scale=work.head_dim**-0.5, softcap=None)
            _fill(run, generator)
            fresh = True
            for index, step in enumerate(program.steps):
                if step.launches:
                    counts = [float(getattr(load, name)[index, rank]) for name in COUNTS]
                    yield _Sample(
                        direction,
                        counts,
                        partial(run.compute, step),
                        partial(_clear, run.slots if fresh else {}),
                    )
                    fresh = False


def _home(
    plan: Plan, rank: int, direction: Direction, work: CurveWork, generator: torch.Generator
) -> Slots:
    rows = int(plan.layout.sizes[rank])
    heads = (work.heads[0], work.heads[1], work.heads[1], work.heads[0])
    q, k, v, dout = (
        torch.randn(1, rows, h, work.head_dim, generator=generator).to(work.dtype) for h in heads
    )
    home = forward_home(q, k, v, None)
    if direction == "forward":
        return home
    # Large statistics make probabilities small: what is added up over passes stays finite.
    lse = torch.full_like(home[Channel.O, 0][1], 20.0)
    return backward_home(dout, q, k, v, lse, torch.zeros_like(lse))


def _fill(run: Run, generator: torch.Generator) -> None:
    """Gives slots beyond home the numbers that messages would bring."""
    for (channel, slot), tensors in run.slots.items():
        if slot == 0 or channel in ACCUMULATORS:
            continue
        for index, tensor in enumerate(tensors):
            values = torch.randn(tensor.shape, generator=generator)
            statistic = channel == Channel.Q and index >= 2
            tensor.copy_(torch.full_like(values, 20.0 * (index == 2)) if statistic else values)


def _clear(slots: Slots) -> None:
    """Empties a forward's accumulators: its first launch writes, and later ones merge."""
    for (channel, _), tensors in slots.items():
        if channel == Channel.O:
            out, lse = tensors
            out.zero_()
            lse.fill_(NO_KEY)
