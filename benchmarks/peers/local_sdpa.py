"""Whole-sequence attention by PyTorch's SDPA: the local part of head-parallel peers, and the
one-process yardstick.

Each mask is computed in the cheapest way that a user would think of, never by a dense mask of the
whole sequence: causal by the flag, documents by one call each, a window by runs of query rows with
the keys that any of them sees, a shared question by one masked call per document.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ringattn.benchmarks.peers.cases import MaskCase

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
WINDOW_ROWS = 256
"""Query rows per call under a window: the fastest of 256, 512 and 1,024 on one core."""


def local_attention(case: MaskCase) -> tuple[Attention, str]:
    """(function of whole q, k, v (B, S, H, D), how it computes the mask). Differentiable."""
    if case.name == "causal":
        return _causal, "SDPA, causal flag"
    if case.name == "window":
        rows = min(WINDOW_ROWS, case.window)
        return _blocks(*_window_blocks(case, rows)), f"SDPA, masked runs of {rows} rows"
    if case.name == "shared_question":
        return _blocks(*_shared_blocks(case)), "SDPA, one masked call per document"
    return _documents(case), "SDPA, one call per document"


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


def _documents(case: MaskCase) -> Attention:
    # split, not slices: its backward is one concatenation instead of a padded sum per document.
    sizes, causal = list(case.lengths), case.causal

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1), strict=True)
        return torch.cat([_call(*part, causal=causal) for part in parts], 1)

    return attend


def _blocks(
    sizes: Sequence[int], keys: Sequence[Sequence[int]], masks: Sequence[torch.Tensor | None]
) -> Attention:
    """Blocks of the sequence; queries of block i see the key blocks keys[i] under masks[i]."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        qs, ks, vs = (x.split(list(sizes), 1) for x in (q, k, v))
        outs = []
        for block, seen, mask in zip(qs, keys, masks, strict=True):
            operands = [x[seen[0]] if len(seen) == 1 else torch.cat([x[j] for j in seen], 1)
                        for x in (ks, vs)]  # fmt: skip
            outs.append(_call(block, *operands, causal=mask is None, mask=mask))
        return torch.cat(outs, 1)

    return attend


def additive(allowed: torch.Tensor) -> torch.Tensor:
    """The float32 mask of a bool one: 0 where allowed, else -inf."""
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)


def _window_blocks(
    case: MaskCase, rows: int
) -> tuple[list[int], list[list[int]], list[torch.Tensor | None]]:
    starts = list(range(0, case.seq_len, rows))
    sizes = [min(rows, case.seq_len - a) for a in starts]
    keys, masks = [], []
    for index, (a, size) in enumerate(zip(starts, sizes, strict=True)):
        first = max(a - case.window + 1, 0) // rows
        distance = torch.arange(first * rows, a + size)[None] - torch.arange(a, a + size)[:, None]
        keys.append(list(range(first, index + 1)))
        masks.append(additive((distance <= 0) & (distance > -case.window)))
    return sizes, keys, masks


def _shared_blocks(
    case: MaskCase,
) -> tuple[list[int], list[list[int]], list[torch.Tensor | None]]:
    question = case.lengths[0]
    keys: list[list[int]] = [[0]]
    masks: list[torch.Tensor | None] = [None]
    for index, size in enumerate(case.lengths[1:], start=1):
        own = torch.ones(size, size, dtype=torch.bool).tril_()
        keys.append([0, index])
        masks.append(additive(torch.cat([torch.ones(size, question, dtype=torch.bool), own], 1)))
    return list(case.lengths), keys, masks
