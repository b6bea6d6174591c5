"""The masks of the kernel benchmark, of any length: LongCA-bench's 14 and seven more.

Masks and samplings after LongCA-bench (arXiv 2510.17896). Lengths of `documents` and other masks
made of them are drawn from MagiAttention's histogram of a training corpus: most are below 1K
tokens. Masks named `_4k` have documents of 4K tokens in the mean. Everything is seeded by mask and
length. `suites.mask_cases` has the same masks with more draws; what is common lies there.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

import ringattn as ra
from ringattn.benchmarks.calibration_rows import typical_packs
from ringattn.benchmarks.suites.mask_cases import (
    filled,
    kept_blocks,
    prompt_tree,
    variable_blocks,
)
from ringattn.masks import Mask

WINDOW, SINKS, BLOCK, KEPT = 1024, 64, 128, 0.1
LEAST = 256  # shortest sequence that all masks exist for


def _documents(seq_len: int) -> list[int]:
    """A pack of typical mask area from the histogram."""
    return filled(typical_packs(seq_len)[1], seq_len)


def _long(seq_len: int, name: str) -> list[int]:
    """Documents of 4K tokens in the mean, uniform from 1K to 7K; scaled to short sequences."""
    mean = min(4096, seq_len // 4)
    draws = _rng(name, seq_len).uniform(mean / 4, 7 * mean / 4, 2 * seq_len // mean)
    return filled(draws.astype(np.int64), seq_len)


def _rng(name: str, seq_len: int) -> np.random.Generator:
    return np.random.default_rng([seq_len, *name.encode()])


def _global_sliding(seq_len: int) -> Mask:
    width = _rng("global_sliding", seq_len).integers(1, seq_len // 3)
    return ra.masks.global_sliding(seq_len, int(width))


def _prefix_lm(seq_len: int) -> Mask:
    return ra.masks.prefix_lm(seq_len, int(_rng("prefix_lm", seq_len).integers(1, seq_len)))


def _prefix_lm_documents(seq_len: int) -> Mask:
    """One random prefix length for all documents."""
    lengths = _documents(seq_len)
    prefix = _rng("prefix_lm_documents", seq_len).integers(1, max(lengths))
    return ra.masks.prefix_lm_documents(lengths, int(prefix))


def _block_causal(seq_len: int) -> Mask:
    """1 to 8 blocks of 1,024 tokens per document; shorter blocks below 8K."""
    block = min(1024, seq_len // 8)
    counts = _rng("block_causal_documents", seq_len).integers(1, 9, seq_len // block)
    return ra.masks.block_causal_documents(filled(counts * block, seq_len), block)


def _blocks_uniform(seq_len: int) -> Mask:
    count = seq_len // BLOCK
    matrix = kept_blocks(_rng("blocks_uniform", seq_len), count, count, KEPT)
    return ra.masks.blocks(matrix, BLOCK, BLOCK)


def _blocks_variable(seq_len: int) -> Mask:
    """Blocks of 128 tokens at least and 256 in the mean, of queries and of keys."""
    rng = _rng("blocks_variable", seq_len)
    q, k = (variable_blocks(rng, seq_len, BLOCK, 2 * BLOCK) for _ in range(2))
    return ra.masks.blocks(kept_blocks(rng, len(q), len(k), KEPT), q, k)


def _neighborhood(seq_len: int) -> Mask:
    """13 × 13 around each token of an image, row by row; the image is about square."""
    height = 1 << ((seq_len.bit_length() - 1) // 2)
    return ra.masks.neighborhood((height, seq_len // height), 13)


def _neighborhood_tiled(seq_len: int) -> Mask:
    """The image in tiles of 8 × 16 tokens, each of which sees 3 × 3 tiles."""
    height = 1 << ((seq_len.bit_length() - 1) // 2)
    width = seq_len // height
    window = min(24, height), min(48, width // 16 * 16)
    return ra.masks.neighborhood((height, width), window, stride=(8, 16), tile=(8, 16))


_BUILDERS: dict[str, Callable[[int], Mask]] = {
    "full": ra.masks.full,
    "causal": ra.masks.causal,
    "documents": lambda n: ra.masks.documents(_documents(n), causal=False),
    "documents_causal": lambda n: ra.masks.documents(_documents(n), causal=True),
    "window": lambda n: ra.masks.sliding_window(n, min(WINDOW, n // 4), min(WINDOW, n // 4)),
    "window_causal": lambda n: ra.masks.sliding_window(n, min(WINDOW, n // 4), 0),
    "shared_question": lambda n: ra.masks.shared_question(_documents(n)),
    "global_sliding": _global_sliding,
    "causal_blockwise": lambda n: ra.masks.causal_blockwise(_documents(n)),
    "prefix_lm": _prefix_lm,
    "prefix_lm_documents": _prefix_lm_documents,
    "block_causal_documents": _block_causal,
    "blocks_uniform": _blocks_uniform,
    "blocks_variable": _blocks_variable,
    "prefix_tree": prompt_tree,
    "neighborhood": _neighborhood,
    "neighborhood_tiled": _neighborhood_tiled,
    "streaming": lambda n: ra.masks.streaming(n, SINKS, min(WINDOW, n // 4)),
    "documents_causal_4k": lambda n: ra.masks.documents(_long(n, "documents_4k"), causal=True),
    "shared_question_4k": lambda n: ra.masks.shared_question(_long(n, "shared_question_4k")),
    "causal_blockwise_4k": lambda n: ra.masks.causal_blockwise(_long(n, "causal_blockwise_4k")),
}
NAMES = tuple(_BUILDERS)


@lru_cache(maxsize=4)
def mask_named(name: str, seq_len: int) -> Mask:
    """The mask of a name; `seq_len` is a power of two, at least `LEAST`."""
    return _BUILDERS[name](seq_len)
