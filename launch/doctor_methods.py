"""Every method on several masks over the real group, against the dense float64 reference."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch

import ringattn as ra
from ringattn import choice
from ringattn.errors import UserError
from ringattn.kernels import DenseAttention
from ringattn.launch.doctor_wait import finish
from ringattn.masks import Mask
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.plan import Plan

TENSORS = ("out", "dq", "dk", "dv")
NESTED = ("double_ring", "usp", "loongtrain", "hybrid")  # plans that look at nodes
# Largest relative error, 2-norm over a rank's rows; bfloat16 results are rounded to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Cell:
    """One way to attend one mask. node: ranks that the plan takes to share a node."""

    method: str
    mask: str
    node: int

    def named(self, real_node: int) -> str:
        """Such as "usp × causal", with the nodes where they are not the real ones."""
        nodes = "" if self.node == real_node else f" ({self.node} ranks per node)"
        return f"{self.method} × {self.mask}{nodes}"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a rank found in a cell, or what all ranks did.

    Attributes:
        status: "ok", "refused", "wrong", or "failed" with an exception.
        error, tensor: largest relative error, and where. repeats: a second run gave equal bits.
        message: why it was refused or failed. rank: whose result it is.
    """

    status: str
    error: float = 0.0
    tensor: str = ""
    repeats: bool = True
    message: str = ""
    rank: int = 0
    silent: bool = False


def mask_set(tokens: int, quick: bool) -> dict[str, Mask]:
    """Masks of `tokens` tokens by name."""
    m, uneven = ra.masks, _documents(tokens)
    masks = {
        "causal": m.causal(tokens),
        "documents": m.documents(uneven, causal=True),
        "sliding_window": m.sliding_window(tokens, tokens // 5, 0),
        "prefix_lm": m.prefix_lm(tokens, tokens // 3),
        "full": m.full(tokens),
        "streaming": m.streaming(tokens, 5, tokens // 7),
    }
    return dict(list(masks.items())[:2]) if quick else masks


def _documents(tokens: int) -> list[int]:
    """Lengths of a long, some middle and two very short documents, that divide by nothing."""
    lengths = [tokens // 2 - 3, tokens // 5, 1, tokens // 7, 2]
    return [*lengths, tokens - sum(lengths)]


def tokens_for(world: int, device: torch.device) -> int:
    """Tokens of a sequence: little enough for a dense reference on every rank."""
    each = 128 if device.type == "cuda" else 32
    return max(128, min(2048, each * world), 2 * world)


def cells_for(masks: Sequence[str], world: int, node: int) -> dict[str, list[Cell]]:
    """Cells by method. Methods that look at nodes see two of them where there is but one."""
    halves = world // 2 if node == world and world >= 4 and world % 2 == 0 else node
    return {
        method: [Cell(method, mask, halves if method in NESTED else node) for mask in masks]
        for method in METHODS
    }


class Trial:
    """The tensors of all cells on one rank, made from a seed that all ranks share.

    Args:
        world: ranks of the default group. device: of this rank. dtype: of q, k and v.
        masks: by name, over equally many tokens. staged: as in `ContextParallel`.
        timeout: seconds that a cell may take.
    """

    def __init__(
        self,
        world: int,
        device: torch.device,
        dtype: torch.dtype,
        masks: dict[str, Mask],
        staged: str | None,
        timeout: float,
    ) -> None:
        self.device, self.dtype, self.masks, self.timeout = device, dtype, masks, timeout
        kv_heads = min(world, 8)
        self.context = ra.ContextParallel(
            None,
            heads=(2 * kv_heads, kv_heads),
            head_dim=64 if device.type == "cuda" else 16,
            dtype=dtype,
            # NCCL's own watchdog would end the process before this rank could say why.
            timeout=timedelta(seconds=timeout * (2 if device.type == "cuda" else 1)),
            staged=staged,
        )
        self._references: dict[str, DenseAttention] = {}

    @cached_property
    def whole(self) -> list[torch.Tensor]:
        """q, k, v and dout of the whole sequence, equal on all ranks."""
        generator = torch.Generator().manual_seed(1)
        tokens = next(iter(self.masks.values())).seq_len
        dim = self.context.head_dim[0]
        heads = self.context.heads
        return [
            torch.randn(1, tokens, count, dim, generator=generator).to(self.device, self.dtype)
            for count in (heads[0], heads[1], heads[1], heads[0])
        ]

    def reference(self, mask: str) -> DenseAttention:
        """Dense attention and gradients; computed once per mask. No communication."""
        if mask not in self._references:
            q, k, v, dout = self.whole
            self._references[mask] = ra.reference(q, k, v, self.masks[mask], dout)
        return self._references[mask]

    def plan(self, cell: Cell) -> Plan:
        """The plan of a cell on the one context of all cells, so that all share communicators.

        Raises:
            UserError: the method does not plan this.
        """
        context = self.context

        def pose(mask: Mask, layout: ra.Layout) -> Problem:
            return Problem(
                mask=mask,
                layout=layout,
                shapes=context.shapes,
                ranks_per_node=cell.node,
                wire=context.wire,
            )

        mask = self.masks[cell.mask]
        layout, method, schedules = choice.choose(
            mask, context.world, cell.node, "auto", cell.method, pose
        )
        return Plan(context, mask, layout, method, schedules)

    def run(self, cell: Cell) -> CellResult:
        """Runs a cell twice and compares. Every rank calls it; nothing is raised."""
        rank = self.context.rank
        try:
            plan = self.plan(cell)
        except UserError as error:
            return CellResult(status="refused", message=str(error), rank=rank)
        try:
            first, second = self._attend(plan), self._attend(plan)
            error, tensor = self._worst(plan, cell.mask, first)
            repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            late = isinstance(error, ra.CommunicationError | TimeoutError)
            return CellResult(status="failed", message=message, rank=rank, silent=late)
        good = error <= TOLERANCE[self.dtype]  # NaN is not
        return CellResult(
            status="ok" if good else "wrong",
            error=error,
            tensor=tensor,
            repeats=repeats,
            rank=rank,
        )

    def _attend(self, plan: Plan) -> list[torch.Tensor]:
        """out, dq, dk, dv of this rank's rows."""
        q, k, v, dout = (plan.shard(x).contiguous() for x in self.whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = ra.attention(q, k, v, plan)
        grads = torch.autograd.grad(out, leaves, dout)
        finish(self.device, time.monotonic() + self.timeout)
        return [out.detach(), *grads]

    def _worst(self, plan: Plan, mask: str, got: list[torch.Tensor]) -> tuple[float, str]:
        """The largest relative error and its tensor; NaN counts as the largest."""
        errors = []
        for name, mine in zip(TENSORS, got, strict=True):
            whole = getattr(self.reference(mask), name)
            want = plan.shard(whole)
            share = want.numel() / whole.numel()
            # Rows with small values are not compared more strictly than others.
            norm = max(float(want.norm()), float(whole.norm()) * math.sqrt(share)) or 1.0
            error = float((mine.double() - want).norm()) / norm
            errors.append((math.inf if math.isnan(error) else error, name))
        return max(errors)


def merge_cell(results: Sequence[CellResult]) -> CellResult:
    """All ranks' results of a cell as one: a failure before a wrong result, the cause before those
    who waited for it."""
    failed = [r for r in results if r.status == "failed"]
    if failed:
        return min(failed, key=lambda r: (r.silent, r.rank))
    refused = [r for r in results if r.status == "refused"]
    if refused and len(refused) < len(results):
        return CellResult(status="failed", message=refused[0].message, rank=refused[0].rank)
    worst = max(results, key=lambda r: r.error)
    odd = [r for r in results if not r.repeats]
    if odd and worst.status == "ok":
        worst = odd[0]
    return worst


def tell_cell(name: str, found: CellResult, tolerance: float) -> str | None:
    """One line about a cell in which something is wrong; None for one that is right."""
    if found.status == "failed":
        return f"{name} failed on rank {found.rank}: {found.message}"
    if found.status == "wrong":
        return (
            f"{name}: {found.tensor} is wrong on rank {found.rank} by {found.error:.1e} "
            f"(at most {tolerance:.0e})"
        )
    if not found.repeats:
        return f"{name}: two runs on rank {found.rank} gave different bits"
    return None
