"""Every named mask against a predicate over (i, j), pair by pair."""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest

from ringattn import Mask, masks
from ringattn.bands import find_overlap
from ringattn.masks import from_bands

Predicate = Callable[[int, int], bool]
S = 37
LENGTHS = ([7, 1, 12, 3, 14], [1, 1, 1], [5], [1, 20, 1])
STATIC_CASES: dict[str, tuple[Mask, Predicate]] = {
    "full": (masks.full(S), lambda i, j: True),
    "full of one token": (masks.full(1), lambda i, j: True),
    "causal": (masks.causal(S), lambda i, j: j <= i),
    "causal of one token": (masks.causal(1), lambda i, j: True),
}


def _check(mask: Mask, allowed: Predicate) -> None:
    expected = np.array(
        [[bool(allowed(i, j)) for j in range(mask.seq_len)] for i in range(mask.seq_len)]
    )
    wrong = np.argwhere(mask.dense() != expected)
    assert not len(wrong), f"{mask}: wrong at (query, key) {wrong[:5].tolist()}"
    assert mask.area == expected.sum()
    assert find_overlap(mask.bands) is None


def _document(lengths: list[int]) -> tuple[list[int], list[int]]:
    """Of each token: its document, and its place in the document."""
    owner = [d for d, n in enumerate(lengths) for _ in range(n)]
    starts = [0, *accumulate(lengths)]
    return owner, [t - starts[d] for t, d in enumerate(owner)]


@pytest.mark.parametrize("name", STATIC_CASES)
def test_full_and_causal(name: str) -> None:
    _check(*STATIC_CASES[name])


@pytest.mark.parametrize(
    "left, right", [(5, 3), (0, 0), (4, 0), (0, 4), (50, 0), (36, 36), (50, 50)]
)
def test_sliding_window(left: int, right: int) -> None:
    _check(masks.sliding_window(S, left, right), lambda i, j: i - left <= j <= i + right)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_documents(lengths: list[int]) -> None:
    doc, _ = _document(lengths)
    _check(masks.documents(lengths, causal=False), lambda i, j: doc[i] == doc[j])
    causal = masks.documents(lengths, causal=True)
    _check(causal, lambda i, j: doc[i] == doc[j] and j <= i)
    for window in (1, 2, 5, max(lengths) - 1):
        if 0 < window < max(lengths):
            _check(
                masks.documents(lengths, causal=True, window=window),
                lambda i, j, w=window: doc[i] == doc[j] and 0 <= i - j < w,
            )
    # A window that cuts nothing off is no other mask: plans are cached by it.
    for window in (max(lengths), 1000):
        assert masks.documents(lengths, causal=True, window=window).key == causal.key


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_shared_question(lengths: list[int]) -> None:
    doc, _ = _document(lengths)
    _check(
        masks.shared_question(lengths),
        lambda i, j: (doc[i] == doc[j] and j <= i) or (doc[i] >= 1 and doc[j] == 0),
    )


@pytest.mark.parametrize("width", [0, 1, 4, 36, 37, 60])
def test_global_sliding(width: int) -> None:
    _check(
        masks.global_sliding(S, width),
        lambda i, j: i < width or j < width or abs(i - j) <= width,
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_blockwise(lengths: list[int]) -> None:
    doc, _ = _document(lengths)
    last = len(lengths) - 1
    _check(
        masks.causal_blockwise(lengths),
        lambda i, j: j <= i and (doc[i] == doc[j] or doc[i] == last),
    )


@pytest.mark.parametrize("prefix", [0, 1, 5, 37, 99])
def test_prefix_lm(prefix: int) -> None:
    _check(masks.prefix_lm(S, prefix), lambda i, j: j < prefix or j <= i)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5, 99])
def test_prefix_lm_documents(lengths: list[int], prefix: int) -> None:
    doc, place = _document(lengths)
    _check(
        masks.prefix_lm_documents(lengths, prefix),
        lambda i, j: doc[i] == doc[j] and (place[j] < prefix or j <= i),
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("block", [1, 4, 50])
def test_block_causal_documents(lengths: list[int], block: int) -> None:
    doc, place = _document(lengths)
    _check(
        masks.block_causal_documents(lengths, block),
        lambda i, j: doc[i] == doc[j] and place[j] // block <= place[i] // block,
    )


@pytest.mark.parametrize("sinks, window", [(0, 4), (3, 6), (0, 1), (60, 2), (2, 60), (37, 1)])
def test_streaming(sinks: int, window: int) -> None:
    _check(
        masks.streaming(S, sinks, window),
        lambda i, j: j <= i and (j < sinks or i - j < window),
    )


@pytest.mark.parametrize(
    "clip, context, stride",
    [(8, 2, 5), (5, 0, 3), (10, 12, 7), (50, 1, 1), (3, 1, 40), (1, 0, 1), (1, 0, 37), (4, 9, 4)],
)
def test_dual_scope(clip: int, context: int, stride: int) -> None:
    _check(
        masks.dual_scope(S, clip, context, stride),
        lambda i, j: i // clip == j // clip or abs(i - j) <= context or j % stride == 0,
    )


@pytest.mark.parametrize(
    "parents", [[-1, 0, 0, 1, -1], [-1, 0, 1, 2, 3], [-1] * 5, [-1, 0, 0, 0, 0]], ids=str
)
def test_prefix_tree(parents: list[int]) -> None:
    lengths = LENGTHS[0]
    segment, _ = _document(lengths)

    def ancestors(index: int) -> set[int]:
        return {index} if parents[index] < 0 else {index} | ancestors(parents[index])

    _check(
        masks.prefix_tree(lengths, parents),
        lambda i, j: j <= i and segment[j] in ancestors(segment[i]),
    )


def test_bands_as_given() -> None:
    rows = [(1, 40, 2, 40, -9, 9, 3), (2, 40, 0, 40, -20, 10, 6)]

    def allowed(i: int, j: int) -> bool:
        return any(
            i in range(q0, q1, step) and j in range(k0, k1, step) and lo <= j - i <= hi
            for q0, q1, k0, k1, lo, hi, step in rows
        )

    _check(from_bands(40, rows), allowed)
    _check(from_bands(9, []), lambda i, j: False)


def test_equal_masks_have_equal_keys_and_others_do_not() -> None:
    built = [
        masks.full(S),
        masks.full(S + 1),
        masks.causal(S),
        masks.sliding_window(S, 4, 0),
        masks.sliding_window(S, 5, 0),
        masks.sliding_window(S, 4, 1),
        masks.documents([20, 17], causal=True),
        masks.documents([17, 20], causal=True),
        masks.documents([20, 17], causal=False),
        masks.streaming(S, 2, 5),
        masks.from_bands(S, []),
        masks.from_bands(S + 1, []),
    ]
    assert len({mask.key for mask in built}) == len(built)
    assert len(set(built)) == len(built)
    assert masks.documents([20, 17], causal=True) == masks.documents(
        tuple(np.array([20, 17])), True
    )
    assert hash(masks.causal(S)) == hash(masks.causal(S))
    assert masks.causal(S) == masks.documents([S], causal=True)  # the same pairs, another builder


def test_a_window_as_wide_as_the_sequence_is_causal() -> None:
    assert masks.sliding_window(S, S, 0) == masks.causal(S)
    assert masks.prefix_lm(S, 0) == masks.causal(S)


def test_a_mask_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        masks.causal(S).bands["hi"] = 1


def test_the_area_of_a_million_tokens_is_exact() -> None:
    n = 1 << 20
    assert masks.causal(n).area == n * (n + 1) // 2
    assert masks.full(n).area == n * n
    assert masks.sliding_window(n, 1023, 0).area == n * 1024 - 1023 * 1024 // 2
