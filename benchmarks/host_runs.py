"""Attention steps of real plans on gloo ranks, timed: what predictions are held to."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.benchmarks.suites.mask_cases import Sampled, sampled
from ringattn.cost import Cluster, price_pair

TIMEOUT = 300.0  # seconds for one request


@dataclass(frozen=True)
class Cell:
    """A plan by what it is made from; float32, batch 1, layout "auto"."""

    mask: str
    method: str
    world: int
    seq_len: int
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64

    @property
    def name(self) -> str:
        """The name of the cell's record."""
        heads = f"h{self.heads[0]}x{self.heads[1]}-d{self.head_dim}"
        return f"{self.mask}-{self.seq_len}-{heads}-fp32-p{self.world}-{self.method}"

    def sampled(self) -> Sampled:
        """The mask, and what was drawn for it."""
        return sampled(self.mask, self.seq_len, q_heads=self.heads[0])

    def plan(self, group: int | None) -> ra.Plan:
        """The plan, over simulated ranks or the default group: the same one.

        Raises:
            UserError: the method does not plan this.
        """
        return ra.ContextParallel(
            group,
            heads=self.heads,
            head_dim=self.head_dim,
            dtype=torch.float32,
            method=self.method,
            ranks_per_node=self.world,
        ).plan(self.sampled().mask)


@dataclass(frozen=True)
class Prepare:
    """Plans a cell and runs it once; answered by the plan's digest."""

    cell: Cell


@dataclass(frozen=True)
class Time:
    """Runs a prepared cell once; answered by `Seconds`."""

    cell: Cell


@dataclass(frozen=True)
class Forget:
    """Drops what was prepared."""


@dataclass(frozen=True)
class Seconds:
    """A rank's step: wall seconds of forward and backward, and CPU seconds of all its threads."""

    forward: float
    backward: float
    cpu: float

    @property
    def wall(self) -> float:
        """Both directions."""
        return self.forward + self.backward


def answer(request: Prepare | Time | Forget, rank: int, world: int, state: dict[str, Any]) -> Any:
    """What a rank of a `RankPool` does."""
    del world
    if isinstance(request, Forget):
        state.clear()
        gc.collect()
        return None
    if isinstance(request, Prepare):
        gc.disable()  # a collection at a random step would be timed
        state[request.cell.name] = _prepared(request.cell, rank)
        _step(*state[request.cell.name])
        return state[request.cell.name][0].digest
    dist.barrier()
    return _step(*state[request.cell.name])


def _prepared(cell: Cell, rank: int) -> tuple[ra.Plan, list[torch.Tensor], torch.Tensor]:
    plan = cell.plan(None)
    rows = int(plan.layout.sizes[rank])
    generator = torch.Generator().manual_seed(rank)
    heads = (cell.heads[0], cell.heads[1], cell.heads[1], cell.heads[0])
    q, k, v, dout = (torch.randn(1, rows, h, cell.head_dim, generator=generator) for h in heads)
    return plan, [x.requires_grad_() for x in (q, k, v)], dout


def _step(plan: ra.Plan, leaves: list[torch.Tensor], dout: torch.Tensor) -> Seconds:
    q, k, v = leaves
    cpu, start = time.process_time(), time.perf_counter()
    out = ra.attention(q, k, v, plan)
    middle = time.perf_counter()
    torch.autograd.grad(out, leaves, dout)
    end = time.perf_counter()
    return Seconds(middle - start, end - middle, time.process_time() - cpu)


@dataclass(frozen=True)
class Prediction:
    """A step as the cost model sees it: seconds of the slowest rank by direction, and CPU seconds
    of the busiest."""

    forward: float
    backward: float
    cpu: float

    @property
    def wall(self) -> float:
        """Both directions."""
        return self.forward + self.backward


def predict(plan: ra.Plan, cluster: Cluster) -> Prediction:
    """Prices the plan that ranks run."""
    both = price_pair((plan.forward, plan.backward), cluster)
    busy = sum(p.compute + p.copies for p in both)
    carried = np.sum([p.carrying for p in both if p.carrying is not None], axis=0)
    return Prediction(both[0].seconds, both[1].seconds, float((busy + carried).max()))
