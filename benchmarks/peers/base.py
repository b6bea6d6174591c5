"""What the comparison asks of a contender, and what it hands to one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ringattn.benchmarks.peers.cases import MaskCase

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Heads of queries and keys, head dim, and the seed of the inputs; float32, batch 1."""

    q_heads: int
    kv_heads: int
    head_dim: int
    seed: int = 0

    def inputs(self, seq_len: int) -> Tensors:
        """Whole q, k, v, dout (1, S, heads, D), float32, equal in every process."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        q, k, v, dout = (
            torch.randn(1, seq_len, h, self.head_dim, generator=generator) for h in heads
        )
        return q, k, v, dout


@dataclass(frozen=True)
class Prepared:
    """A contender's share of one problem on this rank, ready to run.

    Attributes:
        positions: int64 (T,), the global token of each local row; -1 for padding.
        run: one forward and backward; returns out, dq, dk, dv (1, T, heads, D) of the local rows.
            All ranks communicate in it.
        note: one line, how the mask is computed.
        planned_bytes: bytes this rank receives in a run, where the contender knows them.
    """

    positions: np.ndarray
    run: Callable[[], Tensors]
    note: str
    planned_bytes: int | None = None


class Contender(Protocol):
    """A way to compute sharded attention. Instances travel to the ranks by pickle."""

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        ...

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Why the problem cannot run here, in one line; None if it can. Does not communicate."""
        ...

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """This rank's share over the default process group; every rank calls it alike."""
        ...


def autograd_run(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dout: torch.Tensor,
) -> Callable[[], Tensors]:
    """One forward and backward of a differentiable attention as a `Prepared.run`."""
    leaves = tuple(x.detach().requires_grad_() for x in qkv)

    def run() -> Tensors:
        out = attend(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return out.detach(), dq, dk, dv

    return run
