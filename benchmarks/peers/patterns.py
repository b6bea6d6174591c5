"""Which mask a peer would call a mask: full, causal, a window, packed documents, or another one.

Read off the bands' rows: where every query sees one run of keys, first and last key by row tell.
"""

from dataclasses import dataclass

import numpy as np

from ringattn.blocks import plain_bands
from ringattn.masks import Mask

FULL, CAUSAL, WINDOW = "full", "causal", "window"
DOCUMENTS, TWO_SIDED_DOCUMENTS = "documents", "bidirectional_documents"
SHARED_QUESTION, OTHER = "shared_question", "other"
PATTERNS = (FULL, CAUSAL, WINDOW, DOCUMENTS, TWO_SIDED_DOCUMENTS, SHARED_QUESTION, OTHER)
MOST_BANDS = 100_000  # masks of more are no simple pattern and take long to read


@dataclass(frozen=True)
class Pattern:
    """What a mask is: one of `PATTERNS`, lengths of documents, keys before and after a query."""

    pattern: str
    lengths: tuple[int, ...] = ()
    before: int = 0
    ahead: int = 0


def pattern_of(mask: Mask) -> Pattern:
    """The pattern of a mask; `OTHER` where heads differ or a query sees several runs of keys."""
    runs = _runs(mask)
    if runs is None:
        return Pattern(OTHER)
    first, stop = runs
    rows, length = np.arange(mask.seq_len), mask.seq_len
    before, ahead = int((rows - first).max()), int((stop - 1 - rows).max())
    is_window = np.array_equal(first, np.maximum(rows - before, 0))
    is_window &= np.array_equal(stop, np.minimum(rows + ahead + 1, length))
    if is_window and before == length - 1 and ahead in (0, length - 1):
        return Pattern(FULL if ahead else CAUSAL, before=before, ahead=ahead)
    if is_window:
        return Pattern(WINDOW, before=before, ahead=ahead)
    return _documents(first, stop)


def is_causal(mask: Mask) -> bool:
    """Whether no query of any head attends a later key."""
    bands, _ = plain_bands(mask)
    latest = np.minimum(bands["hi"], bands["k1"] - 1 - bands["q0"])
    return bool((latest <= 0).all())


def _runs(mask: Mask) -> tuple[np.ndarray, np.ndarray] | None:
    """First key and last + 1 of every query; None where some query sees no single run."""
    if not mask.is_uniform or mask.routing is not None:
        return None
    bands, _ = plain_bands(mask)
    strided = (bands["step"] > 1) & (
        (bands["k1"] - bands["k0"] > 1) | (bands["q1"] - bands["q0"] > 1)
    )
    if len(bands) > MOST_BANDS or strided.any():
        return None
    first = np.full(mask.seq_len, mask.seq_len)
    stop, count = np.zeros_like(first), np.zeros_like(first)
    for q0, q1, k0, k1, lo, hi, _ in bands.tolist():
        rows = np.arange(q0, q1)
        start, end = np.maximum(k0, rows + lo), np.minimum(k1, rows + hi + 1)
        first[q0:q1] = np.minimum(first[q0:q1], start)
        stop[q0:q1] = np.maximum(stop[q0:q1], end)
        count[q0:q1] += end - start
    return (first, stop) if np.array_equal(count, stop - first) and count.all() else None


def _documents(first: np.ndarray, stop: np.ndarray) -> Pattern:
    rows = np.arange(len(first))
    starts = np.flatnonzero(np.concatenate([[True], first[1:] != first[:-1]]))
    ends = np.append(starts[1:], len(first))
    lengths = tuple(int(n) for n in ends - starts)
    if not np.array_equal(first[starts], starts):
        return Pattern(OTHER)
    if np.array_equal(stop, rows + 1):
        return Pattern(DOCUMENTS, lengths)
    if np.array_equal(stop, np.repeat(ends, lengths)):
        return Pattern(TWO_SIDED_DOCUMENTS, lengths)
    return Pattern(OTHER)
