"""Attention backward by batched matrix products, for calls too small for the CPU flash op.

Below 768 query rows the op's bfloat16 backward loses to its float32 one, and both to this: scores
and probability gradients are float32 products, the three gradient products are bfloat16. Each
partial gradient is rounded once and summed in float32. Other dtypes use their accumulator dtype
throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringattn.kernels.cpu_calls import Call
from ringattn.kernels.cpu_views import key_blocks, query_blocks

ROWS, KEYS = 1280, 512
"""A larger problem is taken in pieces of this size."""
CHUNK = ROWS * KEYS
"""Scores held at once, of several problems or heads where these are small."""


@dataclass(frozen=True)
class ProductOperands:
    """Buffers (B, T, H, dim): wide in the accumulator dtype, narrow in that of the products.

    lse holds +inf for rows without keys.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    q_narrow: torch.Tensor
    k_narrow: torch.Tensor
    dout_narrow: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


@dataclass(frozen=True)
class Workspace:
    """Flat scratch of `CHUNK` numbers each, reused by every chunk of a launch."""

    score: torch.Tensor
    dprob: torch.Tensor
    prob_narrow: torch.Tensor
    dscore_narrow: torch.Tensor

    @classmethod
    def allocate(cls, wide: torch.dtype, narrow: torch.dtype) -> "Workspace":
        """Scratch for such dtypes; the narrow part is the wide one where they are the same."""
        score, dprob = (torch.empty(CHUNK, dtype=wide) for _ in range(2))
        if narrow == wide:
            return cls(score, dprob, score, dprob)
        return cls(score, dprob, *(torch.empty(CHUNK, dtype=narrow) for _ in range(2)))


@dataclass(frozen=True)
class _Views:
    """A call's operands for some heads, each (problems, heads, rows or keys[, dim])."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    q_narrow: torch.Tensor
    k_narrow: torch.Tensor
    dout_narrow: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def add_gradients(
    call: Call,
    mask: torch.Tensor | None,
    operands: ProductOperands,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: slice,
    key_heads: slice,
    scale: float,
    work: Workspace,
) -> None:
    """Adds one call's gradients to grads = (dq, dk, dv), in place.

    `heads` is a whole number of query heads per key head of `key_heads`; `mask` (rows, keys) is
    additive.
    """
    group = (heads.stop - heads.start) // (key_heads.stop - key_heads.start)
    for batch in range(operands.q.shape[0]):
        for member in range(group):
            mine = slice(heads.start + member, heads.stop, group)
            views = _views(call, batch, operands, grads, mine, key_heads)
            for rows in _pieces(call.rows, ROWS):
                for keys in _pieces(call.keys, KEYS):
                    part = None if mask is None else mask[rows, keys]
                    area = (rows.stop - rows.start) * (keys.stop - keys.start)
                    for index in _batches(views.q.shape[:2], CHUNK // area, call.keys_overlap):
                        _add_chunk(views, index, rows, keys, part, scale, work)


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _batches(
    shape: torch.Size, limit: int, one_problem: bool
) -> Iterator[tuple[int | slice, int | slice]]:
    """Indices into (problems, heads) that leave one batch dim of at most `limit`.

    Runs along the longer of the two; along heads where problems must not be added at once.
    """
    problems, heads = shape
    if problems > heads and not one_problem:
        for head in range(heads):
            for piece in _pieces(problems, limit):
                yield piece, head
        return
    for problem in range(problems):
        for piece in _pieces(heads, limit):
            yield problem, piece


def _views(
    call: Call,
    batch: int,
    x: ProductOperands,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    heads: slice,
    key_heads: slice,
) -> _Views:
    def of_query(t: torch.Tensor) -> torch.Tensor:
        return query_blocks(t, batch, call, heads)

    def of_key(t: torch.Tensor) -> torch.Tensor:
        return key_blocks(t, batch, call, key_heads)

    return _Views(
        q=of_query(x.q),
        k=of_key(x.k),
        v=of_key(x.v),
        dout=of_query(x.dout),
        q_narrow=of_query(x.q_narrow),
        k_narrow=of_key(x.k_narrow),
        dout_narrow=of_query(x.dout_narrow),
        lse=of_query(x.lse),
        delta=of_query(x.delta),
        dq=of_query(grads[0]),
        dk=of_key(grads[1]),
        dv=of_key(grads[2]),
    )


def _add_chunk(
    x: _Views,
    index: tuple[int | slice, int | slice],
    rows: slice,
    keys: slice,
    mask: torch.Tensor | None,
    scale: float,
    work: Workspace,
) -> None:
    """P = exp(scale q k' - lse), dV += P' dO, dS = P (dO v' - delta), dQ += dS k, dK += dS' q."""
    at_q, at_k = (*index, rows), (*index, keys)
    q, k, dout = x.q[at_q], x.k[at_k], x.dout[at_q]
    shape = (q.shape[0], q.shape[1], k.shape[1])
    size = shape[0] * shape[1] * shape[2]
    score, dprob = (t[:size].view(shape) for t in (work.score, work.dprob))
    prob, dscore = (t[:size].view(shape) for t in (work.prob_narrow, work.dscore_narrow))

    lse, delta = x.lse[at_q].unsqueeze(-1), x.delta[at_q].unsqueeze(-1)
    torch.baddbmm(-lse, q, k.transpose(1, 2), alpha=scale, out=score)
    if mask is not None:
        score.add_(mask)
    score.exp_()
    torch.baddbmm(-delta, dout, x.v[at_k].transpose(1, 2), out=dprob)
    dprob.mul_(score)
    if prob.dtype != score.dtype:
        prob.copy_(score)
        dscore.copy_(dprob)
    x.dv[at_k].add_(torch.bmm(prob.transpose(1, 2), x.dout_narrow[at_q]))
    x.dq[at_q].add_(torch.bmm(dscore, x.k_narrow[at_k]), alpha=scale)
    x.dk[at_k].add_(torch.bmm(dscore.transpose(1, 2), x.q_narrow[at_q]), alpha=scale)
