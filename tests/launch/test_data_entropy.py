"""Unigram and bigram entropies against loops over dictionaries."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from ringattn.launch import entropy
from ringattn.launch.corpus import load_meta
from ringattn.launch.prepare import prepare
from tests.launch.corpora import random_texts, small_corpus, stored_documents, write_jsonl

VOCAB = 257


def naive(folder: Path) -> tuple[float, float]:
    """(unigram, bigram) in nats, pair by pair."""
    train, heldout = (
        [pair for doc in stored_documents(folder, split) for pair in itertools.pairwise(doc)]
        for split in ("train", "heldout")
    )
    pairs, contexts = Counter(train), Counter(a for a, _ in train)
    tokens = Counter(b for _, b in train)
    unigram = sum(-math.log((tokens[b] + 1) / (len(train) + VOCAB)) for _, b in heldout)
    bigram = sum(-math.log((pairs[a, b] + 1) / (contexts[a] + VOCAB)) for a, b in heldout)
    return unigram / len(heldout), bigram / len(heldout)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_against_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(entropy, "_CHUNK", chunk)
    folder = small_corpus(tmp_path)
    found = load_meta(folder).entropy
    for name, wanted in zip(("unigram", "bigram"), naive(folder), strict=True):
        value = found[name]
        assert value is not None
        assert value["nats"] == pytest.approx(wanted, rel=1e-12)
        assert value["bits"] == pytest.approx(wanted / math.log(2), rel=1e-12)


def test_null_where_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", random_texts(30, 0))
    assert prepare(source, tmp_path / "whole", holdout=0).entropy == {
        "unigram": None, "bigram": None,
    }  # fmt: skip
    monkeypatch.setattr(entropy, "MAX_BIGRAM_VOCAB", 256)
    found = prepare(source, tmp_path / "wide", holdout=0.3).entropy
    assert found["bigram"] is None
    assert found["unigram"] is not None
