"""Unigram and bigram entropies of a corpus: what a trained model's held-out loss must beat.

Cross-entropy of the held-out split under counts of the training split with add-one smoothing,

    unigram  -log (c(b) + 1) / (N + V)        bigram  -log (c(a, b) + 1) / (c(a) + V)

averaged over the tokens that a model is asked to predict: all but the first of each document.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ringattn.launch.corpus import CorpusMeta, open_shard

MAX_BIGRAM_VOCAB = 4096
"""Dense counts above this would be large, and add-one smoothing over so many pairs says nothing."""

_CHUNK = 1 << 22


def corpus_entropy(folder: str | Path, meta: CorpusMeta) -> dict[str, dict[str, float] | None]:
    """The `entropy` entry of `CorpusMeta`; values are null where a split has nothing to predict,
    and for bigrams where the vocabulary exceeds `MAX_BIGRAM_VOCAB`. Bounded memory.
    """
    bigrams = meta.vocab_size <= MAX_BIGRAM_VOCAB
    train = _count(folder, meta, "train", bigrams)
    heldout = _count(folder, meta, "heldout", bigrams)
    if not train[0].sum() or not heldout[0].sum():
        return {"unigram": None, "bigram": None}
    result: dict[str, dict[str, float] | None] = {
        "unigram": _cross_entropy(train[0][None], heldout[0][None]),
        "bigram": None,
    }
    if train[1] is not None and heldout[1] is not None:
        result["bigram"] = _cross_entropy(train[1], heldout[1])
    return result


def _cross_entropy(train: np.ndarray, heldout: np.ndarray) -> dict[str, float]:
    """Counts (contexts, V) of both splits -> mean nats and bits per held-out token."""
    smoothed = train + 1.0
    log_p = np.log(smoothed) - np.log(smoothed.sum(axis=1, keepdims=True))
    nats = float(-(heldout * log_p).sum() / heldout.sum())
    return {"nats": nats, "bits": nats / math.log(2)}


def _count(
    folder: str | Path, meta: CorpusMeta, split: str, bigrams: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """int64 counts (V,) of predicted tokens, and (V, V) of (context, token) pairs or None."""
    vocab = meta.vocab_size
    single = np.zeros(vocab, np.int64)
    pairs = np.zeros(vocab * vocab, np.int64) if bigrams else None
    for context, token in _predictions(folder, meta, split):
        single += np.bincount(token, minlength=vocab)
        if pairs is not None:
            pairs += np.bincount(context * vocab + token, minlength=vocab * vocab)
    return single, None if pairs is None else pairs.reshape(vocab, vocab)


def _predictions(
    folder: str | Path, meta: CorpusMeta, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of (context, next token) inside documents, int64."""
    for shard in meta.split(split):
        tokens, offsets = open_shard(folder, meta, shard)
        for start in range(0, len(tokens) - 1, _CHUNK):
            piece = np.asarray(tokens[start : start + _CHUNK + 1], np.int64)
            inside = np.ones(len(piece) - 1, bool)
            first = np.searchsorted(offsets, start + 1)
            last = np.searchsorted(offsets, start + len(piece))
            inside[offsets[first:last] - start - 1] = False  # tokens that begin a document
            yield piece[:-1][inside], piece[1:][inside]
