"""The passes of a plain ring: whole key/value shards go round, whatever the mask.

Forward: P - 1 hops of k and v, partial outputs merged by their log-sum-exp. Backward: k and v go
round again, and dk and dv travel with them in float32, P hops so that they end at home. Each hop is
posted before the step's calls and waited for after them. Scheme: Liu et al., "Ring Attention with
Blockwise Transformers" (2023), as the public ring-flash-attention packages run it, over PyTorch's
CPU flash operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
NO_KEY = -1e30  # log-sum-exp of a row without keys; finite, so that no merge gives NaN


@dataclass(frozen=True)
class RingCall:
    """One call of the operator: rows of the local queries, rows of the visiting keys, the mask.

    Attributes:
        q, k: rows of the local shard, and of the shard that visits in this step.
        causal: row a sees keys b <= a of the call (upper left).
        mask: additive (rows, keys) or (1, heads, rows, keys), in the inputs' dtype, or None.
        unseen: bool (rows,) or (heads, rows) of rows without a key; None where all rows have one.
        first: no earlier call writes these query rows.
    """

    q: slice
    k: slice
    causal: bool = False
    mask: torch.Tensor | None = None
    unseen: torch.Tensor | None = None
    first: bool = False


@dataclass(frozen=True)
class Ring:
    """A rank's place in the ring and its calls; at step s the keys of rank - s visit."""

    rank: int
    world: int
    steps: tuple[tuple[RingCall, ...], ...]

    def pass_on(self, tensor: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Starts sending a tensor to the next rank; (what arrives from the previous one, works)."""
        arriving = torch.empty_like(tensor)
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        return arriving, [dist.isend(tensor, after), dist.irecv(arriving, before)]


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


class RingAttention(torch.autograd.Function):
    """out = RingAttention.apply(q, k, v, ring); local shards (1, T, heads, D), all ranks alike."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring
    ) -> torch.Tensor:
        """Runs the forward ring."""
        qt, visiting = q.transpose(1, 2), torch.stack((k, v))
        out = torch.zeros_like(q).transpose(1, 2)
        lse = q.new_full(q.shape[:3], NO_KEY).transpose(1, 2)
        for step, calls in enumerate(ring.steps):
            last = step + 1 == ring.world
            arriving, works = (visiting, []) if last else ring.pass_on(visiting)
            kt, vt = (x.transpose(1, 2) for x in visiting)
            for call in calls:
                _attend(call, qt, kt, vt, out, lse)
            _wait(works)
            visiting = arriving
        result = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Runs the backward ring."""
        q, k, v, out, lse = ctx.saved_tensors
        ring, (dout,) = ctx.ring, grads
        visiting, dq = torch.stack((k, v)), torch.zeros_like(q)
        gradients = torch.zeros_like(visiting)  # dk, dv of the visiting keys
        returning: list[Any] = []
        for step, calls in enumerate(ring.steps):
            last = step + 1 == ring.world
            arriving, works = (visiting, []) if last else ring.pass_on(visiting)
            own = torch.zeros_like(visiting)
            for call in calls:
                _add_gradients(call, (dout, q, *visiting, out, lse), dq, own)
            _wait(returning)
            gradients = own if step == 0 else gradients.add_(own)
            gradients, returning = ring.pass_on(gradients)
            _wait(works)
            visiting = arriving
        _wait(returning)
        dk, dv = gradients
        return dq, dk, dv, None


def _attend(
    call: RingCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merges one call into (out, lse), head-major (1, H, T[, D])."""
    part, part_lse = _forward_op(
        q[:, :, call.q], k[:, :, call.k], v[:, :, call.k], 0.0, call.causal, attn_mask=call.mask
    )
    if call.unseen is not None:
        part_lse = part_lse.masked_fill(call.unseen, NO_KEY)
    into, into_lse = out[:, :, call.q], lse[:, :, call.q]
    if call.first:
        into.copy_(part)
        into_lse.copy_(part_lse)
        return
    weight = torch.sigmoid(part_lse - into_lse).unsqueeze(-1)
    into.sub_(weight * (into - part))
    into_lse.copy_(torch.logaddexp(into_lse, part_lse))


def _add_gradients(
    call: RingCall, operands: Sequence[torch.Tensor], dq: torch.Tensor, dkv: torch.Tensor
) -> None:
    """Adds one call's gradients to dq (1, T, H, D) and dkv (2, 1, T, Hkv, D)."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in operands[:5])
    lse = operands[5]
    part = _backward_op(
        dout[:, :, call.q],
        q[:, :, call.q],
        k[:, :, call.k],
        v[:, :, call.k],
        out[:, :, call.q],
        lse[:, :, call.q],
        0.0,
        call.causal,
        attn_mask=call.mask,
    )
    dq[:, call.q].add_(part[0].transpose(1, 2))
    for into, gradient in zip(dkv, part[1:], strict=True):
        into[:, call.k].add_(gradient.transpose(1, 2))
