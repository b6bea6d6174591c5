"""What the comparison asks of a contender, and what it hands to one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ringattn.benchmarks.peers.cases import MaskCase

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Forward = Callable[
    [], tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]
]


@dataclass(frozen=True)
class Shape:
    """Heads of queries and keys, head dim, the seed, dtype and device of the inputs; batch 1.

    `device` is "cpu" or "cuda", which is every rank's current one.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def inputs(self, seq_len: int) -> Tensors:
        """Whole q, k, v, dout (1, S, heads, D), equal in every process."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.q_heads, self.kv_heads, self.kv_heads, self.q_heads)
        q, k, v, dout = (
            torch.randn(1, seq_len, h, self.head_dim, generator=generator).to(
                self.device, self.dtype
            )
            for h in heads
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
        forward: one forward alone; returns out and a function that runs the backward of it once
            and returns dq, dk, dv. All ranks communicate in both.
        counted: whether `wire.counted_wire` sees what the contender sends.
    """

    positions: np.ndarray
    run: Callable[[], Tensors]
    note: str
    planned_bytes: int | None = None
    forward: Forward | None = None
    counted: bool = True


class Contender(Protocol):
    """A way to compute sharded attention. Instances travel to the ranks by pickle.

    Its package is imported by `refusal` and `prepare` alone, never with the module.
    """

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        ...

    @property
    def package(self) -> str:
        """The distribution that it comes from."""
        ...

    def installed(self) -> str | None:
        """Version of the package, None where it is missing."""
        ...

    def refusal(self, case: MaskCase, shape: Shape, world: int) -> str | None:
        """Why the problem cannot run here, in one line; None if it can. Does not communicate."""
        ...

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        """This rank's share over the default process group; every rank calls it alike."""
        ...


def prepare_autograd(
    positions: np.ndarray,
    attend: Attend,
    inputs: Tensors,
    note: str,
    *,
    planned_bytes: int | None = None,
    counted: bool = True,
) -> Prepared:
    """The share of a differentiable attention over local q, k, v, dout (1, T, heads, D)."""
    *qkv, dout = inputs
    q, k, v = (x.detach().requires_grad_() for x in qkv)

    def forward() -> tuple[
        torch.Tensor, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ]:
        out = attend(q, k, v)

        def backward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
            return dq, dk, dv

        return out.detach(), backward

    def run() -> Tensors:
        out, backward = forward()
        return out, *backward()

    return Prepared(positions, run, note, planned_bytes, forward, counted)


def rows_at(inputs: Tensors, positions: np.ndarray) -> Tensors:
    """Rows of whole q, k, v, dout at global tokens; zeros where a position is -1."""
    index = torch.from_numpy(positions).to(inputs[0].device)
    padded = (index < 0).view(1, -1, 1, 1)
    q, k, v, dout = (x.index_select(1, index.clamp_min(0)).masked_fill(padded, 0.0) for x in inputs)
    return q, k, v, dout
