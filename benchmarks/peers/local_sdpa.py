"""Whole-sequence attention by PyTorch's SDPA: the local part of head-parallel peers, and the
one-process yardstick.

Each mask is computed in the cheapest way that a user would think of: full without a mask, causal by
the flag, documents by one call each, a window by runs of query rows with the keys that any of them
sees, a shared question by one masked call per document, and every other mask by runs of rows with
the blocks of keys that any of them sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ringattn.benchmarks.peers.base import Attend, Shape
from ringattn.benchmarks.peers.cases import MaskCase, allowed_block
from ringattn.benchmarks.peers.patterns import CAUSAL, FULL, OTHER, SHARED_QUESTION, WINDOW

RUN_ROWS = 256
"""Query rows per masked call: the fastest of 256, 512 and 1,024 under a window on one core."""
LEAST_ROWS = 64
MOST_MASK_BYTES = 2 << 30


@dataclass(frozen=True)
class _Run:
    """Queries of one block of the sequence: the blocks of keys that they see, and how.

    Attributes:
        keys: blocks; none where the queries see nothing.
        mask: additive (queries, keys) or (1, heads, queries, keys), or None where all is allowed.
        causal: the causal flag instead of a mask.
    """

    keys: tuple[int, ...]
    mask: torch.Tensor | None = None
    causal: bool = False


def local_refusal(case: MaskCase, shape: Shape) -> str | None:
    """Why a mask has no form here, in one line; None if it has one."""
    if case.unfit or case.pattern != OTHER:
        return case.unfit
    layers = 1 if case.mask().is_uniform else shape.q_heads
    size = layers * case.seq_len**2 * shape.dtype.itemsize
    if size > MOST_MASK_BYTES:
        return f"SDPA would need a dense mask of up to {size / 2**30:.1f} GiB"
    return None


def local_attention(case: MaskCase, shape: Shape, heads: range | None = None) -> tuple[Attend, str]:
    """(function of whole q, k, v (B, S, H, D), how it computes the mask). Differentiable.

    `heads` are the query heads of the call, all by default; they matter where heads differ.
    """
    if case.pattern == FULL:
        return _call, "SDPA"
    if case.pattern == CAUSAL:
        return _causal, "SDPA, causal flag"
    if case.pattern == WINDOW:
        rows = min(RUN_ROWS, max(case.window, LEAST_ROWS))
        return _blocks(*_window_runs(case, rows, shape)), f"SDPA, masked runs of {rows} rows"
    if case.pattern == SHARED_QUESTION and case.lengths:
        return _blocks(*_shared_runs(case, shape)), "SDPA, one masked call per document"
    if case.is_packed:
        return _documents(case), "SDPA, one call per document"
    heads = heads or range(shape.q_heads)
    return _blocks(*_any_runs(case, shape, heads)), f"SDPA, masked runs of {RUN_ROWS} rows"


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = (x.transpose(1, 2) for x in (q, k, v))
    out = sdpa(*operands, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return _call(q, k, v, causal=True)


def _documents(case: MaskCase) -> Attend:
    # split, not slices: its backward is one concatenation instead of a padded sum per document.
    sizes, causal = list(case.lengths), case.causal

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        return torch.cat([_call(*part, causal=causal) for part in parts], 1)

    return attend


def _blocks(sizes: Sequence[int], runs: Sequence[_Run]) -> Attend:
    """Blocks of the sequence; queries of block i see what runs[i] says."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qs, ks, vs = (x.split(list(sizes), 1) for x in (q, k, v))
        outs = []
        for block, run in zip(qs, runs, strict=True):
            if not run.keys:
                outs.append(torch.zeros_like(block))
                continue
            operands = [x[run.keys[0]] if len(run.keys) == 1 else torch.cat(
                [x[j] for j in run.keys], 1) for x in (ks, vs)]  # fmt: skip
            outs.append(_call(block, *operands, causal=run.causal, mask=run.mask))
        return torch.cat(outs, 1)

    return attend


def additive(allowed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The mask of a bool one (queries, keys) or (heads, queries, keys) for SDPA: 0, or -inf where
    nothing is allowed, in the queries' dtype."""
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
    return mask if allowed.ndim == 2 else mask[None]  # the flash operator takes 2 or 4 dimensions


def _run_sizes(seq_len: int, rows: int) -> list[int]:
    return [min(rows, seq_len - a) for a in range(0, seq_len, rows)]


def _window_runs(case: MaskCase, rows: int, shape: Shape) -> tuple[list[int], list[_Run]]:
    sizes, runs = _run_sizes(case.seq_len, rows), []
    for index, size in enumerate(sizes):
        a = index * rows
        first = max(a - case.window + 1, 0) // rows
        stop = min((a + size - 1 + case.ahead) // rows + 1, len(sizes))
        end = min(stop * rows, case.seq_len)
        distance = torch.arange(first * rows, end)[None] - torch.arange(a, a + size)[:, None]
        allowed = (distance <= case.ahead) & (distance > -case.window)
        mask = additive(allowed, shape.dtype).to(shape.device)
        runs.append(_Run(tuple(range(first, stop)), mask))
    return sizes, runs


def _shared_runs(case: MaskCase, shape: Shape) -> tuple[list[int], list[_Run]]:
    question = case.lengths[0]
    runs = [_Run((0,), causal=True)]
    for index, size in enumerate(case.lengths[1:], start=1):
        own = torch.ones(size, size, dtype=torch.bool).tril_()
        allowed = torch.cat([torch.ones(size, question, dtype=torch.bool), own], 1)
        runs.append(_Run((0, index), additive(allowed, shape.dtype).to(shape.device)))
    return list(case.lengths), runs


def _any_runs(case: MaskCase, shape: Shape, heads: range) -> tuple[list[int], list[_Run]]:
    """Runs of any mask: the blocks of keys that any query of any head sees."""
    mask = case.mask().for_heads(shape.q_heads, heads.start, heads.stop)
    sizes = _run_sizes(case.seq_len, RUN_ROWS)
    edges = np.arange(0, case.seq_len, RUN_ROWS)
    runs = []
    for start, size in zip(edges.tolist(), sizes, strict=True):
        block = range(start, start + size)
        allowed = allowed_block(mask, block, range(case.seq_len), len(heads))
        seen = allowed.any(axis=tuple(range(allowed.ndim - 1)))
        held = np.flatnonzero(np.logical_or.reduceat(seen, edges))
        columns = np.concatenate([np.arange(0), *(np.arange(edges[j], edges[j] + sizes[j])
                                                  for j in held)])  # fmt: skip
        part = torch.from_numpy(allowed[..., columns])
        whole = bool(part.all())
        runs.append(
            _Run(
                tuple(int(j) for j in held),
                None if whole else additive(part, shape.dtype).to(shape.device),
            )
        )
    return sizes, runs
