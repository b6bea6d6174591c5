"""FlexAttention's operators with the lse and delta of the whole sequence, compiled or not.

PyTorch's `flex_attention` hides both behind autograd. Below it lie two higher-order operators
(torch._higher_order_ops.flex_attention). The backward one takes lse in base 2 and the gradient of
that lse, which it subtracts from rowsum(dout * out): with `out` = 0 and -ln 2 * delta as that
gradient, delta is ours. The operators are traced and given to Inductor as `torch.compile` would.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch._higher_order_ops.flex_attention import (
    create_fw_bw_graph,
    flex_attention,
    flex_attention_backward,
)
from torch.fx.experimental.proxy_tensor import make_fx

from ringattn.kernels.flex_mask import FlexMask, Tensors

LN2 = math.log(2.0)

OPTIONS = {
    "BACKEND": "TRITON",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""Kernel options as `flex_attention` sets them; its own Triton kernels, also for few rows."""


class Problem(NamedTuple):
    """What a graph is made for besides its tensors."""

    scale: float
    softcap: float | None


class FlexOp(Protocol):
    """FlexAttention over (B, H, T, D), lse and delta (B, H, Tq) of natural logarithms.

    Attributes:
        dense: whether it needs dense masks (see `device_mask`), because it does not look at blocks.
    """

    dense: bool

    def forward(
        self,
        mask: FlexMask,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Tensors:
        """(out, lse), lse -inf for rows without keys."""
        ...

    def backward(
        self,
        mask: FlexMask,
        problem: Problem,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Tensors:
        """(dq, dk, dv)."""
        ...


class EagerFlex:
    """The operators' dense definition, O(Tq * Tk) memory: for tests, on any device."""

    dense = True

    def forward(
        self,
        mask: FlexMask,
        problem: Problem,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Tensors:
        """See `FlexOp.forward`."""
        return self._run("forward", forward_graph(mask, problem), mask, problem, (q, k, v))

    def backward(
        self,
        mask: FlexMask,
        problem: Problem,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
    ) -> Tensors:
        """See `FlexOp.backward`."""
        graph = backward_graph(mask, problem, q)
        return self._run("backward", graph, mask, problem, (dout, q, k, v, lse, delta))

    def _run(
        self,
        name: str,
        graph: Callable[..., Tensors],
        mask: FlexMask,
        problem: Problem,
        operands: Tensors,
    ) -> Tensors:
        return graph(*operands, *mask.tensors)


class CompiledFlex(EagerFlex):
    """The operators compiled, for each mask, shape and layout once; the mask keeps the result.

    Args:
        compiler: (traced graph, example inputs) -> callable; Inductor by default.
        autotune: whether Inductor times several configurations (seconds per graph).
        dense: whether the compiler's result needs dense masks.
    """

    def __init__(
        self,
        compiler: Callable[..., Callable[..., Tensors]] | None = None,
        *,
        autotune: bool = False,
        dense: bool = False,
    ) -> None:
        self.dense = dense
        self._compiler = compiler
        self._autotune = autotune

    def _run(
        self,
        name: str,
        graph: Callable[..., Tensors],
        mask: FlexMask,
        problem: Problem,
        operands: Tensors,
    ) -> Tensors:
        layout = tuple((x.shape, x.stride(), x.dtype) for x in operands)
        key = (name, problem, layout, self._autotune)
        inputs = (*operands, *mask.tensors)
        if key not in mask.graphs:
            traced = make_fx(graph, tracing_mode="fake")(*inputs)
            mask.graphs[key] = self._compile(traced, list(inputs))
        return mask.graphs[key](*inputs)

    def _compile(
        self, traced: torch.fx.GraphModule, inputs: list[torch.Tensor]
    ) -> Callable[..., Tensors]:
        if self._compiler is not None:
            return self._compiler(traced, inputs)
        options = {"max_autotune": True} if self._autotune else None
        return torch._inductor.compile(traced, inputs, options=options)  # type: ignore[return-value]


def forward_graph(mask: FlexMask, problem: Problem) -> Callable[..., Tensors]:
    """A function of q, k, v and the mask's tensors: (out, lse)."""

    def graph(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        block_mask, buffers = mask.arguments(tensors)
        score = _score_mod(problem.softcap)
        out, lse, *_ = flex_attention(
            q, k, v, score, block_mask, problem.scale, OPTIONS, (), buffers
        )
        return out, lse * LN2

    return graph


def backward_graph(
    mask: FlexMask, problem: Problem, example: torch.Tensor
) -> Callable[..., Tensors]:
    """A function of dout, q, k, v, lse, delta and the mask's tensors: (dq, dk, dv).

    Args:
        mask, problem: what it is made for.
        example: a tensor of the dtype and device of q.
    """
    indices = [example.new_zeros((), dtype=torch.int32) for _ in range(4)]
    with torch.enable_grad():
        scalar = example.new_zeros((), requires_grad=True)
        score, joint = create_fw_bw_graph(_score_mod(problem.softcap), (scalar, *indices), ())  # type: ignore[arg-type]

    def graph(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> Tensors:
        block_mask, buffers = mask.arguments(tensors)
        dq, dk, dv, _ = flex_attention_backward(
            q,
            k,
            v,
            torch.zeros_like(dout),
            lse / LN2,
            dout,
            delta * -LN2,
            score,
            joint,  # type: ignore[arg-type]
            block_mask,
            problem.scale,
            OPTIONS,
            (),
            buffers,
        )
        return dq, dk, dv

    return graph


def _score_mod(softcap: float | None) -> Callable[..., torch.Tensor]:
    def plain(score: torch.Tensor, b: Any, h: Any, row: Any, key: Any) -> torch.Tensor:
        return score

    def capped(score: torch.Tensor, b: Any, h: Any, row: Any, key: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    return capped if softcap else plain
