"""Random masks of any kind and length, each with the call that makes it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ringattn import Mask, masks

MOST_TOKENS = 160


@dataclass(frozen=True)
class Recipe:
    """Something random: `kind` for counting, `text` to read, `build` to make it."""

    kind: str
    text: str
    build: Callable[..., Any]


def draw_mask(rng: np.random.Generator, q_heads: int, tokens: int) -> Recipe:
    """A mask that suits `q_heads` query heads, over about so many tokens."""
    kinds = [kind for kind in _MAKERS if kind not in _SPLIT_HEADS or q_heads > 1]
    kind = kinds[int(rng.integers(len(kinds)))]
    return _MAKERS[kind](rng, tokens, q_heads)


def draw_length(rng: np.random.Generator) -> int:
    """Tokens of a sequence: often few, so that shards and tiles vanish."""
    low, high = [(1, 9), (9, 65), (9, 65), (65, MOST_TOKENS + 1)][int(rng.integers(4))]
    return int(rng.integers(low, high))


def draw_parts(rng: np.random.Generator, total: int, *, empty: bool = False) -> list[int]:
    """Random positive lengths that sum to `total`; with `empty`, some of them are 0."""
    cuts = rng.integers(0 if empty else 1, total + 1, int(rng.integers(0, 9)))
    edges = sorted([0, total, *cuts.tolist()])
    return [b - a for a, b in pairwise(edges if empty else sorted(set(edges)))]


def _call(kind: str, *arguments: Any, **settings: Any) -> Recipe:
    """A call of the builder of that name."""
    text = ", ".join([*map(repr, arguments), *(f"{k}={v!r}" for k, v in settings.items())])
    return Recipe(kind, f"{kind}({text})", lambda: getattr(masks, kind)(*arguments, **settings))


def _least(rng: np.random.Generator, most: int, least: int = 0) -> int:
    """A number from `least` to `most`, small ones more often."""
    return least + int((most - least + 1) * rng.random() ** 2)


def _documents(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    lengths, kind = draw_parts(rng, tokens), int(rng.integers(3))
    if kind == 2:
        return _call("documents", lengths, causal=True, window=_least(rng, tokens + 2, 1))
    return _call("documents", lengths, causal=kind == 1)


def _prefix_tree(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    lengths = draw_parts(rng, tokens)
    return _call("prefix_tree", lengths, [int(rng.integers(-1, i)) for i in range(len(lengths))])


def _dual_scope(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    clip, context, stride = _least(rng, tokens, 1), _least(rng, tokens), _least(rng, tokens, 1)
    return _call("dual_scope", tokens, clip, context, stride)


def _neighborhood(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    """Of about so many tokens."""
    axes = int(rng.integers(1, 4))
    side = max(1, round(tokens ** (1 / axes)))
    shape = [int(rng.integers(max(1, side // 2), side + 2)) for _ in range(axes)]
    dilation = [_least(rng, min(3, n), 1) for n in shape]
    window = [_least(rng, n // d, 1) for n, d in zip(shape, dilation, strict=True)]
    stride = [_least(rng, w, 1) for w in window]
    causal = [bool(rng.random() < 0.3) for _ in shape]
    tile = None
    if max(dilation) == 1 and not any(causal) and rng.random() < 0.6:
        sides = zip(shape, stride, strict=True)
        divisors = [[t for t in range(1, n + 1) if n % t == s % t == 0] for n, s in sides]
        tile = [choice[int(rng.integers(len(choice)))] for choice in divisors]
    return _call("neighborhood", shape, window, dilation, stride, causal, tile)


def _bands(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    """Bands over disjoint runs of queries; some queries attend nothing."""
    edges, rows = np.cumsum([0, *draw_parts(rng, tokens)]).tolist(), []
    for q0, q1 in pairwise(edges):
        if rng.random() < 0.8:
            k0, k1 = sorted(rng.integers(0, tokens + 1, 2).tolist())
            lo, hi = sorted(rng.integers(-tokens, tokens + 1, 2).tolist())
            rows.append((q0, q1, k0, max(k1, min(k0 + 1, tokens)), lo, hi, _least(rng, 4, 1)))
    return _call("from_bands", tokens, [row for row in rows if row[2] < row[3]])


def _sizes(rng: np.random.Generator, tokens: int) -> tuple[int | list[int], int]:
    """Block sizes, uniform or one per block, and the number of blocks."""
    if rng.random() < 0.5:
        size = int(rng.integers(1, tokens + 1)) if tokens < 8 else int(rng.integers(3, tokens + 1))
        return size, -(-tokens // size)
    parts = draw_parts(rng, tokens)
    return parts, len(parts)


def _blocks(rng: np.random.Generator, tokens: int, heads: int) -> Recipe:
    (block_q, rows), (block_k, columns) = _sizes(rng, tokens), _sizes(rng, tokens)
    groups = [g for g in range(1, heads + 1) if heads % g == 0]
    count = groups[int(rng.integers(len(groups)))]
    matrix = rng.random((count, rows, columns)) < rng.choice([0.2, 0.5, 0.9])
    within = draw_uniform(rng, tokens) if rng.random() < 0.5 else None
    inside = "" if within is None else f", within={within.text}"
    text = f"blocks({count} x {rows} x {columns} random, {block_q}, {block_k}{inside})"

    def build() -> Mask:
        outer = None if within is None else within.build()
        return masks.blocks(matrix, block_q, block_k, seq_len=tokens, within=outer)

    return Recipe("blocks", text, build)


def _routed(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
    block_q, block_k = (int(rng.integers(1 + tokens // 12, tokens + 1)) for _ in "qk")
    edges = np.arange(0, tokens, block_q)
    own = (np.minimum(edges + block_q, tokens) - 1) // block_k - edges // block_k + 1
    top_k = int(own.max()) + _least(rng, 3)
    within, per_head = draw_uniform(rng, tokens), bool(rng.random() < 0.5)
    text = f"routed({within.text}, {block_q=}, {block_k=}, {top_k=}, {per_head=})"

    def build() -> Mask:
        return masks.routed(
            within.build(), block_k=block_k, top_k=top_k, block_q=block_q, per_head=per_head
        )

    return Recipe("routed", text, build)


def _per_head(rng: np.random.Generator, tokens: int, heads: int) -> Recipe:
    counts = draw_parts(rng, heads)
    parts = []
    for _ in counts:
        plain = draw_uniform(rng, tokens) if rng.random() < 0.8 else _blocks(rng, tokens, 1)
        parts.append(plain)
    text = ", ".join(f"({n}, {part.text})" for n, part in zip(counts, parts, strict=True))

    def build() -> Mask:
        return masks.per_head([(n, part.build()) for n, part in zip(counts, parts, strict=True)])

    return Recipe("per_head", f"per_head([{text}])", build)


def draw_uniform(rng: np.random.Generator, tokens: int) -> Recipe:
    """A mask of exactly so many tokens, alike for all heads and without strides or blocks."""
    kinds = list(_UNIFORM)
    return _UNIFORM[kinds[int(rng.integers(len(kinds)))]](rng, tokens, 1)


def _of_length(kind: str, *least: int) -> Callable[[np.random.Generator, int, int], Recipe]:
    """A builder of the tokens and of numbers from `least` to about the tokens."""
    return lambda rng, n, _heads: _call(kind, n, *(_least(rng, n + 2, low) for low in least))


def _of_parts(kind: str, *least: int) -> Callable[[np.random.Generator, int, int], Recipe]:
    """The same of document lengths."""

    def make(rng: np.random.Generator, tokens: int, _heads: int) -> Recipe:
        numbers = [_least(rng, tokens, low) for low in least]
        return _call(kind, draw_parts(rng, tokens), *numbers)

    return make


_Maker = Callable[[np.random.Generator, int, int], Recipe]
_UNIFORM: dict[str, _Maker] = {
    "full": _of_length("full"),
    "causal": _of_length("causal"),
    "sliding_window": _of_length("sliding_window", 0, 0),
    "documents": _documents,
    "shared_question": _of_parts("shared_question"),
    "global_sliding": _of_length("global_sliding", 0),
    "causal_blockwise": _of_parts("causal_blockwise"),
    "prefix_lm": _of_length("prefix_lm", 0),
    "prefix_lm_documents": _of_parts("prefix_lm_documents", 0),
    "block_causal_documents": _of_parts("block_causal_documents", 1),
    "streaming": _of_length("streaming", 0, 1),
    "dual_scope": _dual_scope,
    "prefix_tree": _prefix_tree,
}
_SPLIT_HEADS = ("per_head",)
_MAKERS: dict[str, _Maker] = {
    **_UNIFORM,
    "neighborhood": _neighborhood,
    "from_bands": _bands,
    "blocks": _blocks,
    "routed": _routed,
    "per_head": _per_head,
}
KINDS = tuple(_MAKERS)
