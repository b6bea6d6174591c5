"""Attention masks as data: named patterns, each a disjoint list of bands over global token ids."""

from collections.abc import Sequence

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import BAND, OPEN, band_columns
from ringattn.errors import UserError, brief
from ringattn.head_masks import blocks, per_head, routed
from ringattn.mask import Mask, make_mask, positive
from ringattn.neighborhood import neighborhood_bands

__all__ = [
    "Mask",
    "block_causal_documents",
    "blocks",
    "causal",
    "causal_blockwise",
    "documents",
    "dual_scope",
    "from_bands",
    "full",
    "global_sliding",
    "neighborhood",
    "per_head",
    "prefix_lm",
    "prefix_lm_documents",
    "prefix_tree",
    "routed",
    "shared_question",
    "sliding_window",
    "streaming",
]


def _at_least_zero(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            raise UserError(f"{name}={value!r}", "must be an integer >= 0", f"pass {name} >= 0")


def _offsets(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
    """Start and stop of each document and the total length."""
    try:
        array = np.asarray(lengths)
    except ValueError:  # ragged
        array = np.empty(0)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or (array < 1).any():
        raise UserError(
            f"lengths={brief(lengths)}",
            "must be a non-empty list of positive integers",
            "drop empty documents and pass one length per document",
        )
    stop = np.cumsum(array.astype(np.int64))
    return stop - array, stop, int(stop[-1])


def from_bands(seq_len: int, rows, name: str = "bands") -> Mask:
    """A mask from (q0, q1, k0, k1, lo, hi, step) rows over global token ids.

    Args:
        seq_len: S.
        rows: (n, 7) integers; lo and hi may be -+`ringattn.bands.OPEN`.

    Raises:
        UserError: a band leaves [0, S), has step < 1, or two bands overlap.
    """
    positive(seq_len=seq_len)
    table = rows if getattr(rows, "dtype", None) == BAND else band_ops.make_bands(rows)
    for index, b in enumerate(table):
        inside = b["q0"] >= 0 and b["q1"] <= seq_len and b["k0"] >= 0 and b["k1"] <= seq_len
        if not inside or b["step"] < 1:
            raise UserError(
                f"band {index}={tuple(int(x) for x in b)}",
                f"ranges must lie in [0, seq_len={seq_len}) and step must be >= 1",
                "crop the band to the sequence",
            )
    tight, origin = band_ops.tighten(table)
    pair = band_ops.find_overlap(tight)
    if pair is not None:
        a, b = sorted(int(origin[i]) for i in pair)
        raise UserError(
            f"bands {a} and {b}",
            "overlap: both allow the same (query, key) pair",
            "split them into disjoint bands",
        )
    tight.setflags(write=False)
    return Mask(seq_len, tight, name)


def full(seq_len: int) -> Mask:
    """Every query attends every key."""
    positive(seq_len=seq_len)
    return make_mask(seq_len, [band_columns(0, seq_len, 0, seq_len)], "full")


def causal(seq_len: int) -> Mask:
    """j <= i."""
    positive(seq_len=seq_len)
    return make_mask(seq_len, [band_columns(0, seq_len, 0, seq_len, hi=0)], "causal")


def sliding_window(seq_len: int, left: int, right: int) -> Mask:
    """i - left <= j <= i + right. right=0 is a causal window of left + 1 keys."""
    positive(seq_len=seq_len)
    _at_least_zero(left=left, right=right)
    table = band_columns(0, seq_len, 0, seq_len, -left, right)
    return make_mask(seq_len, [table], "sliding_window")


def documents(lengths: Sequence[int], causal: bool, window: int | None = None) -> Mask:
    """Packed documents: i and j in the same document, and j <= i if causal.

    Args:
        lengths: tokens of each document, in order.
        causal: keys at or before their query only.
        window: causal documents attend their `window` latest tokens, i - j < window: a query
            counts itself. None, or at least the longest document, gives the mask without one.
    """
    start, stop, total = _offsets(lengths)
    if window is not None:
        positive(window=window)
        if not causal:
            raise UserError(
                f"window={window}", "needs causal documents", "pass causal=True, or no window"
            )
        if window < (stop - start).max():
            table = band_columns(start, stop, start, stop, -(window - 1), 0)
            return make_mask(total, [table], "documents_window")
    table = band_columns(start, stop, start, stop, hi=0 if causal else OPEN)
    return make_mask(total, [table], "documents_causal" if causal else "documents")


def shared_question(lengths: Sequence[int]) -> Mask:
    """Causal documents; documents 1.. also see all of document 0."""
    start, stop, total = _offsets(lengths)
    own = band_columns(start, stop, start, stop, hi=0)
    question = band_columns(stop[0], total, 0, stop[0])
    return make_mask(total, [own, question], "shared_question")


def global_sliding(seq_len: int, width: int) -> Mask:
    """i < width (global rows), or j < width (global columns), or |i - j| <= width."""
    positive(seq_len=seq_len)
    _at_least_zero(width=width)
    g = min(width, seq_len)
    rows = band_columns(0, g, 0, seq_len)
    columns = band_columns(g, seq_len, 0, g)
    window = band_columns(g, seq_len, g, seq_len, -width, width)
    return make_mask(seq_len, [rows, columns, window], "global_sliding")


def causal_blockwise(lengths: Sequence[int]) -> Mask:
    """Causal documents; the last document sees everything before it (j <= i)."""
    start, stop, total = _offsets(lengths)
    own = band_columns(start, stop, start, stop, hi=0)
    before = band_columns(start[-1], total, 0, start[-1])
    return make_mask(total, [own, before], "causal_blockwise")


def prefix_lm(seq_len: int, prefix: int) -> Mask:
    """j < prefix, or j <= i."""
    positive(seq_len=seq_len)
    _at_least_zero(prefix=prefix)
    p = min(prefix, seq_len)
    columns = band_columns(0, seq_len, 0, p)
    rest = band_columns(p, seq_len, p, seq_len, hi=0)
    return make_mask(seq_len, [columns, rest], "prefix_lm")


def prefix_lm_documents(lengths: Sequence[int], prefix: int) -> Mask:
    """Per document: j within its first `prefix` tokens, or j <= i."""
    start, stop, total = _offsets(lengths)
    _at_least_zero(prefix=prefix)
    cut = np.minimum(start + prefix, stop)
    columns = band_columns(start, stop, start, cut)
    rest = band_columns(cut, stop, cut, stop, hi=0)
    return make_mask(total, [columns, rest], "prefix_lm_documents")


def block_causal_documents(lengths: Sequence[int], block: int) -> Mask:
    """Same document and block(j) <= block(i), blocks of `block` tokens counted in the document."""
    start, stop, total = _offsets(lengths)
    positive(block=block)
    which, number = band_ops.expand_ranges(
        np.zeros_like(start), band_ops.ceil_div(stop - start, block)
    )
    q0 = start[which] + number * block
    q1 = np.minimum(q0 + block, stop[which])
    return make_mask(total, [band_columns(q0, q1, start[which], q1)], "block_causal_documents")


def streaming(seq_len: int, sinks: int, window: int) -> Mask:
    """j <= i and (j < sinks or i - j < window): attention sinks plus a causal window."""
    positive(seq_len=seq_len, window=window)
    _at_least_zero(sinks=sinks)
    s = min(sinks, seq_len)
    first = band_columns(0, seq_len, 0, s, hi=0)
    rest = band_columns(s, seq_len, s, seq_len, -(window - 1), 0)
    return make_mask(seq_len, [first, rest], "streaming")


def dual_scope(seq_len: int, clip: int, context: int, stride: int) -> Mask:
    """Same clip of `clip` tokens, or |i - j| <= context, or j a multiple of stride."""
    positive(seq_len=seq_len, clip=clip, stride=stride)
    _at_least_zero(context=context)
    c0 = np.arange(0, seq_len, clip, dtype=np.int64)
    c1 = np.minimum(c0 + clip, seq_len)
    own = band_columns(c0, c1, c0, c1)
    left = band_columns(c0, c1, 0, c0, lo=-context)
    right = band_columns(c0, c1, c1, seq_len, hi=context)
    # Sampled frames: one column each, for the rows that neither clip nor context covers.
    j = np.arange(0, seq_len, stride, dtype=np.int64)
    home = j // clip * clip
    above = band_columns(0, np.minimum(home, j - context), j, j + 1)
    below_start = np.maximum(np.minimum(home + clip, seq_len), j + context + 1)
    below = band_columns(np.minimum(below_start, seq_len), seq_len, j, j + 1)
    return make_mask(seq_len, [own, left, right, above, below], "dual_scope")


def neighborhood(
    shape: Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile: Sequence[int] | None = None,
) -> Mask:
    """1-, 2- or 3-D neighbourhood attention over a row-major (or tile-major) grid of tokens.

    The definition is NATTEN's ("Generalized Neighborhood Attention", arXiv 2504.16922): the
    window is clamped inside the grid, `stride` consecutive queries share the window of their
    group's leader (stride = window is blocked attention), and dilation splits an axis into
    interleaved groups. With a causal axis the window ends at the leader and keys stay <= query.

    Args:
        shape: grid extents, slowest axis first; S is their product.
        window, dilation, stride, causal: one value or one per axis; window * dilation <= extent.
        tile: token order is tile by tile instead of row-major (extents divide the grid); needs
            every stride to be a multiple of the tile and no dilation. Use it for large 3-D windows.

    Raises:
        UserError: bad extents, or more than 2**20 bands (the advice is a tile-major order).
    """
    seq_len, table = neighborhood_bands(shape, window, dilation, stride, causal, tile)
    return make_mask(seq_len, [table], "neighborhood")


def prefix_tree(lengths: Sequence[int], parents: Sequence[int]) -> Mask:
    """Causal, and j's segment is i's or one of its ancestors (shared prompts with rollouts).

    Args:
        lengths: tokens of each segment, in sequence order.
        parents: index of each segment's parent, which comes before it; -1 for a root.
    """
    start, stop, total = _offsets(lengths)
    valid = len(parents) == len(start) and all(
        isinstance(p, int | np.integer) and -1 <= p < i for i, p in enumerate(parents)
    )
    if not valid:
        raise UserError(
            f"parents={brief(parents)}",
            "must name for each segment an earlier segment, or -1 for a root",
            "order segments so that parents come before their children",
        )
    chains: list[list[int]] = []
    for parent in parents:
        chains.append(([*chains[parent], parent]) if parent >= 0 else [])
    child = np.repeat(np.arange(len(start)), [len(c) for c in chains])
    ancestor = np.array([a for chain in chains for a in chain], dtype=np.int64)
    own = band_columns(start, stop, start, stop, hi=0)
    above = band_columns(start[child], stop[child], start[ancestor], stop[ancestor])
    return make_mask(total, [own, above], "prefix_tree")
