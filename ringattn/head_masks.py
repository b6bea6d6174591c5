"""Masks that differ between heads, and masks of blocks: `per_head`, `blocks`, `routed`."""

from collections.abc import Sequence

import numpy as np

from ringattn import bands as band_ops
from ringattn.bands import band_columns
from ringattn.errors import UserError
from ringattn.kernels.block_matrix import BlockMatrix
from ringattn.mask import ANY, NO_MATRIX, Mask, Routing, positive

MOST_SCORES = 1 << 28


def per_head(groups: Sequence[tuple[int, Mask]]) -> Mask:
    """Each group of query heads its own mask: `[(query heads, mask), ...]` in head order.

    A mask with head groups of its own shares its entry's heads among them. Planned for a model of
    as many query heads as the groups have; each key head's rows move only as far as its own query
    heads need them.

    Raises:
        UserError: no group, a count below 1, lengths that differ, or masks selected at run time.
    """
    if not isinstance(groups, list | tuple) or any(
        not isinstance(entry, list | tuple) for entry in groups
    ):
        raise UserError(
            f"groups={str(groups)[:60]}",
            "must be a list of (query heads, mask)",
            "pass e.g. [(8, full), (24, window)]",
        )
    entries = list(groups)
    if not entries:
        raise UserError("groups=[]", "needs at least one group", "pass [(query heads, mask), ...]")
    for entry in entries:
        if len(entry) != 2 or not isinstance(entry[1], Mask):
            raise UserError(f"group {entry!r}", "must be (query heads, mask)", "pass such pairs")
        positive(query_heads=entry[0])
        if entry[1].routing is not None:
            raise UserError(
                f"{entry[1]!r} in per_head",
                "a routed mask serves all heads; routing may select per head itself",
                "use routed(..., per_head=True) for the whole model",
            )
    lengths = sorted({mask.seq_len for _, mask in entries})
    if len(lengths) > 1:
        raise UserError(
            f"masks of {lengths} tokens", "must all have one length", "build them for one seq_len"
        )
    return _joined(entries, lengths[0])


def _joined(entries: list[tuple[int, Mask]], seq_len: int) -> Mask:
    heads: list[int] = []
    bands, group, matrix = [], [], []
    matrices: tuple[BlockMatrix, ...] = ()
    for count, mask in entries:
        bands.append(mask.bands)
        group.append(mask.group + len(heads))
        matrix.append(np.where(mask.matrix >= 0, mask.matrix + len(matrices), NO_MATRIX))
        matrices += mask.matrices
        heads += mask.head_counts(int(count)).tolist()
    table = np.concatenate(bands)
    table.setflags(write=False)
    return Mask(
        seq_len, table, "per_head", tuple(heads), np.concatenate(group),
        matrices, np.concatenate(matrix),
    )  # fmt: skip


def blocks(
    matrix: np.ndarray,
    block_q: int | Sequence[int],
    block_k: int | Sequence[int],
    *,
    seq_len: int | None = None,
    within: Mask | None = None,
) -> Mask:
    """A matrix of allowed (query block, key block) pairs.

    Args:
        matrix: bool (nq, nk), or (groups, nq, nk): query heads are shared equally among the groups.
        block_q, block_k: tokens of a block, or of each block; a last uniform block may be shorter.
        seq_len: S; by default what the blocks cover, or that of `within`.
        within: pairs outside this mask are forbidden too, e.g. `causal(S)`.

    Raises:
        UserError: sizes that do not cover S, a matrix of another shape, or `within` with strides
            or head groups.
    """
    try:
        allowed = np.asarray(matrix)
    except ValueError:  # rows of different lengths
        allowed = np.empty(0, dtype=bool)
    if within is not None:
        _is_mask(within)
    if allowed.dtype != np.bool_ and not np.isin(allowed, (0, 1)).all():
        raise UserError(f"matrix of {allowed.dtype}", "must hold booleans", "pass a bool array")
    if allowed.ndim not in (2, 3) or not allowed.size:
        raise UserError(
            f"matrix of shape {allowed.shape}",
            "must be (query blocks, key blocks) or (groups, query blocks, key blocks)",
            "pass such an array",
        )
    layers = np.array(allowed.reshape(-1, *allowed.shape[-2:]), dtype=bool)
    length = within.seq_len if within is not None else seq_len
    if seq_len is not None and length != seq_len:
        raise UserError(
            f"seq_len={seq_len}", f"`within` has {length} tokens", "give both one length"
        )
    if length is None:
        length = _covered(block_q, layers.shape[1])
    matrices = tuple(
        BlockMatrix(
            _edges(block_q, layers.shape[1], length, "block_q"),
            _edges(block_k, layers.shape[2], length, "block_k"),
            layer,
        )
        for layer in layers
    )
    base = _base(within, length)
    count, groups = len(base), len(layers)
    table = np.tile(base, groups)
    number = np.repeat(np.arange(groups), count)
    table.setflags(write=False)
    return Mask(length, table, "blocks", (ANY,) * groups, number, matrices, number.copy())


def routed(
    within: Mask,
    *,
    block_k: int,
    top_k: int,
    block_q: int | None = None,
    per_head: bool = False,
) -> Mask:
    """Blocks selected at run time: each block of queries attends its `top_k` best blocks of keys.

    Queries and keys are averaged over their blocks; a pair of blocks scores the product of the
    averages. Blocks of keys that hold tokens of the query block always count among the `top_k`;
    ties go to the lower block; selection carries no gradient. Which rows move does not depend on
    the scores, so that nothing waits for the host. `attention` selects by itself; see
    `ringattn.route`.
    Source: mixture of block attention, MoBA (arXiv 2502.13189), over blocks of queries.

    Args:
        within: the pairs that may be selected, e.g. `causal(S)`; one mask for all heads.
        block_k, block_q: tokens per block; block_q defaults to block_k.
        top_k: most blocks of keys per block of queries.
        per_head: every query head selects for itself; otherwise those of a key head together.

    Raises:
        UserError: `top_k` is less than the blocks of keys that a block of queries holds itself.
    """
    _is_mask(within)
    rows = block_k if block_q is None else block_q
    positive(block_k=block_k, block_q=rows, top_k=top_k)
    base, length = _base(within, within.seq_len), within.seq_len
    q_edges, k_edges = (
        _edges(size, -(-length // size), length, name)
        for size, name in ((rows, "block_q"), (block_k, "block_k"))
    )
    if (len(q_edges) - 1) * (len(k_edges) - 1) > MOST_SCORES:
        raise UserError(
            f"{len(q_edges) - 1:,} blocks of queries and {len(k_edges) - 1:,} of keys",
            f"at most {MOST_SCORES:,} pairs of blocks are scored",
            "pass a larger block_q or block_k",
        )
    own = np.searchsorted(k_edges, q_edges[1:], side="left")
    own -= np.searchsorted(k_edges, q_edges[:-1], side="right") - 1
    if top_k < own.max():
        raise UserError(
            f"top_k={top_k}",
            f"a block of {rows} queries holds tokens of {own.max()} blocks of keys itself",
            f"pass top_k >= {own.max()} or a smaller block_q",
        )
    matrix = BlockMatrix(q_edges, k_edges, None)
    zero = np.zeros(len(base), dtype=np.int64)
    count = len(k_edges) - 1
    routing = Routing(
        q_blocks=len(q_edges) - 1,
        k_blocks=count,
        top_k=min(int(top_k), count),
        per_head=bool(per_head),
    )
    return Mask(length, base, "routed", (ANY,), zero, (matrix,), zero.copy(), routing)


def _is_mask(within: object) -> None:
    if not isinstance(within, Mask):
        raise UserError(
            f"within={within!r}", "must be a mask", "pass e.g. ringattn.masks.causal(S)"
        )


def _base(within: Mask | None, length: int) -> np.ndarray:
    """The bands that a matrix restricts."""
    if within is None:
        table, _ = band_ops.tighten(band_columns(0, length, 0, length))
        return table
    if not within.is_uniform or within.matrices or (within.bands["step"] > 1).any():
        raise UserError(
            f"within={within!r}",
            "must be one mask for all heads, without blocks and strides of its own",
            "choose another mask",
        )
    return within.bands


def _covered(size: int | Sequence[int], count: int) -> int:
    """Tokens that blocks cover where no length is given."""
    if isinstance(size, int | np.integer):
        return int(size) * count
    sizes = np.asarray(size)
    return int(sizes.sum()) if sizes.dtype.kind in "iu" else 0


def _edges(size: int | Sequence[int], count: int, length: int, name: str) -> np.ndarray:
    """First token of each block and the length, int64 (count + 1,)."""
    if isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 1:
        made = -(-length // int(size))
        if made != count:
            raise UserError(
                f"{name}={size}",
                f"{length} tokens make {made} such blocks, the matrix has {count}",
                "pass another size, a matrix of that many blocks, or seq_len",
            )
        return np.minimum(np.arange(count + 1, dtype=np.int64) * int(size), length)
    sizes = np.asarray(size)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 1).any():
        raise UserError(
            f"{name}={str(size)[:60]}",
            "must be a positive integer or one per block",
            "pass tokens per block",
        )
    if len(sizes) != count or int(sizes.sum()) != length:
        raise UserError(
            f"{name} of {len(sizes)} blocks and {int(sizes.sum())} tokens",
            f"the matrix has {count} blocks and the sequence {length} tokens",
            "give one size per block that sum to the sequence",
        )
    return np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])
