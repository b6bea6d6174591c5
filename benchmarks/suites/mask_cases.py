"""The masks of all suites, sampled: LongCA-bench's 14 and the others that the library has.

    sampled("shared_question", 65536, pack=3, lengths="short").mask

Masks and samplings after LongCA-bench (arXiv 2510.17896). A pack is one draw of whatever a mask
samples: documents, a width, a prefix, blocks. Every draw is seeded by name, length and pack, so
there are as many packs as are asked for. Sequences too short for a figure of the benchmark (a
window of 1,024 tokens, blocks of 1,024) get one in the same proportion to their length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

import ringattn as ra
from ringattn.benchmarks.suites.document_lengths import read_lengths
from ringattn.errors import UserError
from ringattn.masks import Mask

SEED = 42
LEAST = 128  # shortest sequence that all masks exist for
WINDOW, SINKS, BLOCK = 1024, 64, 1024
KEPT = tuple(tenth / 10 for tenth in range(1, 11))
"""Kept shares of block-sparse masks: pack p keeps the (p mod 10)-th."""
SIZES = (64, 128)
"""Block sizes of uniform blocks: packs 0 to 9 have the first, 10 to 19 the second, and so on."""
MEANS = (128, 256, 512, 1024)
"""Mean sizes of variable blocks: pack p has the (p mod 4)-th."""
LEAST_BLOCK = 128


@dataclass(frozen=True)
class Sampled:
    """A mask and what was drawn for it.

    Attributes:
        mask: as the library has it.
        parameters: what was drawn, JSON values: "width", "prefix", "kept", "documents", ...
        lengths: of the documents, () where there are none.
    """

    mask: Mask
    parameters: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What a builder draws from: the length, the pack, the lengths' name, query heads."""

    name: str
    seq_len: int
    pack: int
    lengths: str
    q_heads: int

    @property
    def rng(self) -> np.random.Generator:
        """Seeded by name, length and pack; a new one each time."""
        return np.random.default_rng([SEED, self.seq_len, self.pack, *self.name.encode()])

    @property
    def window(self) -> int:
        """`WINDOW`, or a quarter of a short sequence."""
        return min(WINDOW, self.seq_len // 4)

    def documents(self) -> tuple[int, ...]:
        """Lengths of the pack: all masks of documents get the same ones."""
        return read_lengths(self.lengths).draw(self.seq_len, self.pack)


def sampled(
    name: str, seq_len: int, pack: int = 0, lengths: str = "short", q_heads: int = 4
) -> Sampled:
    """The mask of a name.

    Args:
        name: one of `NAMES`.
        seq_len: S, at least `LEAST`. pack: which draw, from 0.
        lengths: of documents, as `read_lengths` takes it.
        q_heads: of the model; only masks that differ between heads look at it.

    Raises:
        UserError: an unknown name, a sequence too short, or lengths that cannot be read.
    """
    if name not in _BUILDERS:
        raise UserError(f"mask {name!r}", "is not known", f"use one of {', '.join(NAMES)}")
    if seq_len < LEAST or pack < 0:
        raise UserError(
            f"seq_len={seq_len} pack={pack}", f"must be at least {LEAST} and 0", "pass more"
        )
    return _sampled(Draw(name, seq_len, pack, lengths, q_heads))


@lru_cache(maxsize=32)
def _sampled(draw: Draw) -> Sampled:
    return _BUILDERS[draw.name](draw)


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Names with the groups "all", "longca" and "ours" spelled out, each once, in order.

    Raises:
        UserError: an unknown name.
    """
    groups = {"all": NAMES, "longca": LONGCA, "ours": OURS}
    found: dict[str, None] = {}
    for name in names:
        if name not in groups and name not in NAMES:
            known = ", ".join((*groups, *NAMES))
            raise UserError(f"mask {name!r}", "is not known", f"use some of {known}")
        found |= dict.fromkeys(groups.get(name, (name,)))
    return tuple(found)


def is_sampled(name: str) -> bool:
    """Whether packs differ."""
    return name in _SAMPLED


def _plain(build: Callable[[int], Mask]) -> Callable[[Draw], Sampled]:
    return lambda draw: Sampled(build(draw.seq_len))


def _of_documents(
    build: Callable[[tuple[int, ...]], Mask],
) -> Callable[[Draw], Sampled]:
    def made(draw: Draw) -> Sampled:
        lengths = draw.documents()
        return Sampled(build(lengths), {"documents": len(lengths)}, lengths)

    return made


def _window(causal: bool) -> Callable[[Draw], Sampled]:
    def made(draw: Draw) -> Sampled:
        width = draw.window
        mask = ra.masks.sliding_window(draw.seq_len, width, 0 if causal else width)
        return Sampled(mask, {"window": width})

    return made


def _documents_window(draw: Draw) -> Sampled:
    lengths, window = draw.documents(), draw.window
    mask = ra.masks.documents(lengths, causal=True, window=window)
    return Sampled(mask, {"documents": len(lengths), "window": window}, lengths)


def _global_sliding(draw: Draw) -> Sampled:
    width = int(draw.rng.integers(1, draw.seq_len // 3))
    return Sampled(ra.masks.global_sliding(draw.seq_len, width), {"width": width})


def _prefix_lm(draw: Draw) -> Sampled:
    prefix = int(draw.rng.integers(1, draw.seq_len))
    return Sampled(ra.masks.prefix_lm(draw.seq_len, prefix), {"prefix": prefix})


def _prefix_lm_documents(draw: Draw) -> Sampled:
    """One random prefix length for all documents."""
    lengths = draw.documents()
    prefix = int(draw.rng.integers(1, max(2, max(lengths))))
    mask = ra.masks.prefix_lm_documents(lengths, prefix)
    return Sampled(mask, {"documents": len(lengths), "prefix": prefix}, lengths)


def _block_causal(draw: Draw) -> Sampled:
    """1 to 8 blocks of `BLOCK` tokens per document; shorter blocks below 8K."""
    block = min(BLOCK, draw.seq_len // 8)
    lengths = filled(draw.rng.integers(1, 9, draw.seq_len // block + 1) * block, draw.seq_len)
    mask = ra.masks.block_causal_documents(lengths, block)
    return Sampled(mask, {"documents": len(lengths), "block": block}, tuple(lengths))


def _blocks_uniform(draw: Draw) -> Sampled:
    size = min(SIZES[draw.pack // len(KEPT) % len(SIZES)], draw.seq_len // 16)
    kept, count = KEPT[draw.pack % len(KEPT)], -(-draw.seq_len // size)
    matrix = kept_blocks(draw.rng, count, count, kept)
    mask = ra.masks.blocks(matrix, size, size, seq_len=draw.seq_len)
    return Sampled(mask, {"block": size, "kept": kept})


def _blocks_variable(draw: Draw) -> Sampled:
    """Blocks of `LEAST_BLOCK` tokens at least; in short sequences in proportion."""
    kept, rng = KEPT[draw.pack % len(KEPT)], draw.rng
    least = min(LEAST_BLOCK, draw.seq_len // 16)
    mean = MEANS[draw.pack % len(MEANS)] * least // LEAST_BLOCK
    q, k = (variable_blocks(rng, draw.seq_len, least, mean) for _ in range(2))
    mask = ra.masks.blocks(kept_blocks(rng, len(q), len(k), kept), q, k)
    return Sampled(mask, {"mean_block": mean, "least_block": least, "kept": kept})


def kept_blocks(rng: np.random.Generator, rows: int, columns: int, kept: float) -> np.ndarray:
    """bool (rows, columns): a share of all blocks; each row keeps as many, at least one, at random
    places."""
    scores = rng.random((rows, columns))
    count = max(1, round(kept * columns))
    return scores <= np.partition(scores, count - 1, axis=1)[:, count - 1 : count]


def variable_blocks(rng: np.random.Generator, seq_len: int, least: int, mean: int) -> list[int]:
    """Sizes of blocks that fill a sequence, at least `least` tokens each and `mean` in the mean."""
    draws = least + rng.exponential(max(mean - least, 1e-9), seq_len // least).astype(np.int64)
    sizes = filled(draws, seq_len)
    if len(sizes) > 1 and sizes[-1] < least:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def filled(lengths: np.ndarray, seq_len: int) -> list[int]:
    """The lengths in order, cut and topped up to the sequence."""
    ends = np.minimum(np.cumsum(lengths), seq_len)
    sizes = np.diff(np.concatenate([[0], ends, [seq_len]]))
    return [int(n) for n in sizes if n > 0]


def _blocks_causal(draw: Draw) -> Sampled:
    """Uniform blocks below the diagonal, a quarter of each row's."""
    size = min(64, draw.seq_len // 16)
    count = -(-draw.seq_len // size)
    matrix = kept_blocks(draw.rng, count, count, 0.25) | np.eye(count, dtype=bool)
    mask = ra.masks.blocks(matrix, size, size, within=ra.masks.causal(draw.seq_len))
    return Sampled(mask, {"block": size, "kept": 0.25})


def _block_groups(draw: Draw) -> Sampled:
    """Two groups of heads, each with blocks of its own."""
    size = min(64, draw.seq_len // 16)
    count, rng = -(-draw.seq_len // size), draw.rng
    matrix = np.stack([kept_blocks(rng, count, count, kept) for kept in (0.2, 0.5)])
    mask = ra.masks.blocks(matrix, size, size, seq_len=draw.seq_len)
    return Sampled(mask, {"block": size, "kept": [0.2, 0.5]})


def _per_head(draw: Draw) -> Sampled:
    """A quarter of the heads retrieve (causal), the others stream (sinks and a window)."""
    whole = max(1, draw.q_heads // 4)
    groups = [(whole, ra.masks.causal(draw.seq_len))]
    if draw.q_heads > whole:
        sinks = min(SINKS, draw.seq_len // 16)
        stream = ra.masks.streaming(draw.seq_len, sinks, draw.window)
        groups.append((draw.q_heads - whole, stream))
    return Sampled(ra.masks.per_head(groups), {"retrieval_heads": whole, "heads": draw.q_heads})


def _routed(per_head: bool) -> Callable[[Draw], Sampled]:
    def made(draw: Draw) -> Sampled:
        block = min(128, draw.seq_len // 16)
        mask = ra.masks.routed(
            ra.masks.causal(draw.seq_len), block_k=block, top_k=4, per_head=per_head
        )
        return Sampled(mask, {"block": block, "top_k": 4})

    return made


def _streaming(draw: Draw) -> Sampled:
    sinks, window = min(SINKS, draw.seq_len // 16), draw.window
    return Sampled(
        ra.masks.streaming(draw.seq_len, sinks, window), {"sinks": sinks, "window": window}
    )


def _dual_scope(draw: Draw) -> Sampled:
    """Sixteen clips, a context of half a clip, thirty-two sampled frames."""
    clip, stride = -(-draw.seq_len // 16), -(-draw.seq_len // 32)
    mask = ra.masks.dual_scope(draw.seq_len, clip, clip // 2, stride)
    return Sampled(mask, {"clip": clip, "context": clip // 2, "stride": stride})


def _prefix_tree(draw: Draw) -> Sampled:
    return Sampled(prompt_tree(draw.seq_len), {"segments": 13})


def prompt_tree(seq_len: int) -> Mask:
    """A prompt of a quarter, four branches of a sixteenth, two rollouts of a sixteenth on each."""
    part = seq_len // 16
    lengths, parents = [seq_len - 12 * part], [-1]
    for _ in range(4):
        branch = len(lengths)
        lengths += [part] * 3
        parents += [0, branch, branch]
    return ra.masks.prefix_tree(lengths, parents)


def _strided_bands(draw: Draw) -> Sampled:
    """Tokens 0, 4, 8, ... see each other in a window, tokens 1, 5, 9, ... in a causal one; the
    others see nothing."""
    n = draw.seq_len
    rows = [(0, n, 0, n, -draw.window, draw.window, 4), (1, n, 1, n, -draw.window, 0, 4)]
    return Sampled(ra.masks.from_bands(n, rows, "strided_bands"), {"step": 4})


def grid_of(seq_len: int, axes: int) -> tuple[int, ...]:
    """Extents of a grid of so many tokens, as equal as its divisors allow, slowest axis first."""
    extents, rest = [], seq_len
    for left in range(axes, 1, -1):
        target = round(rest ** (1 / left))
        extents.append(max(d for d in range(1, target + 1) if rest % d == 0))
        rest //= extents[-1]
    return tuple(sorted([*extents, rest]))


def _grid(axes: int, window: int, **settings: Any) -> Callable[[Draw], Sampled]:
    """Neighbourhood attention; the window shrinks to a grid that is too small for it."""

    def made(draw: Draw) -> Sampled:
        shape = grid_of(draw.seq_len, axes)
        dilation, stride = settings.get("dilation", 1), settings.get("stride", 1)
        windows = [max(1, min(window, extent // dilation)) for extent in shape]
        strides = [min(stride, width) for width in windows]
        options = settings | {"stride": strides}
        mask = ra.masks.neighborhood(shape, windows, **options)
        return Sampled(mask, {"shape": list(shape), "window": windows} | options)

    return made


def _tiled(axes: int, tile: int, around: int) -> Callable[[Draw], Sampled]:
    """Tile-major order: queries of a tile share a window of `around` tiles on each axis."""

    def made(draw: Draw) -> Sampled:
        shape = grid_of(draw.seq_len, axes)
        most = [max(1, min(tile, extent // 4)) for extent in shape]
        tiles = [
            max(d for d in range(1, m + 1) if extent % d == 0)
            for m, extent in zip(most, shape, strict=True)
        ]
        windows = [min(around * t, extent // t * t) for t, extent in zip(tiles, shape, strict=True)]
        mask = ra.masks.neighborhood(shape, windows, stride=tiles, tile=tiles)
        return Sampled(mask, {"shape": list(shape), "window": windows, "tile": tiles})

    return made


_LONGCA: dict[str, Callable[[Draw], Sampled]] = {
    "full": _plain(ra.masks.full),
    "causal": _plain(ra.masks.causal),
    "documents": _of_documents(lambda lengths: ra.masks.documents(lengths, causal=False)),
    "documents_causal": _of_documents(lambda lengths: ra.masks.documents(lengths, causal=True)),
    "window": _window(causal=False),
    "window_causal": _window(causal=True),
    "shared_question": _of_documents(ra.masks.shared_question),
    "global_sliding": _global_sliding,
    "causal_blockwise": _of_documents(ra.masks.causal_blockwise),
    "prefix_lm": _prefix_lm,
    "prefix_lm_documents": _prefix_lm_documents,
    "block_causal_documents": _block_causal,
    "blocks_uniform": _blocks_uniform,
    "blocks_variable": _blocks_variable,
}
_OURS: dict[str, Callable[[Draw], Sampled]] = {
    "documents_window": _documents_window,
    "streaming": _streaming,
    "dual_scope": _dual_scope,
    "prefix_tree": _prefix_tree,
    "strided_bands": _strided_bands,
    "neighborhood_1d": _grid(1, 128),
    "neighborhood_1d_dilated": _grid(1, 32, dilation=4),
    "neighborhood_1d_causal": _grid(1, 128, causal=True),
    "neighborhood_2d": _grid(2, 7),
    "neighborhood_2d_strided": _grid(2, 8, stride=4),
    "neighborhood_2d_blocked": _grid(2, 8, stride=8),
    "neighborhood_2d_dilated": _grid(2, 4, dilation=2),
    "neighborhood_2d_tiled": _tiled(2, 8, 3),
    "neighborhood_3d": _grid(3, 3),
    "neighborhood_3d_causal": _grid(3, 3, causal=[True, False, False]),
    "neighborhood_3d_tiled": _tiled(3, 4, 3),
    "blocks_causal": _blocks_causal,
    "block_groups": _block_groups,
    "per_head": _per_head,
    "routed": _routed(per_head=False),
    "routed_per_head": _routed(per_head=True),
}
_BUILDERS = _LONGCA | _OURS
_SAMPLED = {
    "documents", "documents_causal", "shared_question", "global_sliding", "causal_blockwise",
    "prefix_lm", "prefix_lm_documents", "block_causal_documents", "blocks_uniform",
    "blocks_variable", "documents_window", "blocks_causal", "block_groups",
}  # fmt: skip
LONGCA, OURS = tuple(_LONGCA), tuple(_OURS)
NAMES = (*LONGCA, *OURS)
