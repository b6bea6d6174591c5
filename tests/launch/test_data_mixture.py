"""Mixtures, repeats of long documents, changing lengths: exact, a function of position."""

import bisect
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch.document_stream import DocumentStream
from ringattn.launch.mixture import MixtureStream
from ringattn.launch.packing import IGNORE, Batches, PackedDataset
from ringattn.launch.prepare import prepare
from tests.launch.corpora import random_texts, small_corpus, stored_documents, write_jsonl

WEIGHTS = [3.0, 1.0, 0.5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three corpora whose texts tell them apart by their first letter."""
    found = []
    for number, (letter, count, longest) in enumerate([("A", 30, 60), ("B", 9, 400), ("C", 5, 9)]):
        folder = tmp_path_factory.mktemp(letter)
        texts = [letter + text for text in random_texts(count, number, longest)]
        prepare(write_jsonl(folder / "s.jsonl", texts), folder / "c", holdout=0, shard_tokens=500)
        found.append(folder / "c")
    return found


def naive_mixture(
    folders: list[Path], weights: list[float], seed: int, length: int
) -> list[tuple[int, int]]:
    """(token, label) of a mixture: always the corpus whose next document is due first."""
    streams = []
    for folder in folders:
        documents = stored_documents(folder, "train")
        queue: list[list[int]] = []
        number = 0
        while sum(map(len, queue)) < 2 * length + 2000:
            order = np.arange(len(documents))
            np.random.Generator(np.random.PCG64([seed, number])).shuffle(order)
            queue += [documents[i] for i in order]
            number += 1
        streams.append(queue)
    supplied = [0.0] * len(folders)
    places = [0] * len(folders)
    out: list[tuple[int, int]] = []
    while len(out) < length:
        due = [supplied[c] / weights[c] for c in range(len(folders))]
        c = due.index(min(due))
        document = streams[c][places[c]]
        places[c] += 1
        supplied[c] += len(document)
        out += zip(document, [*document[1:], IGNORE], strict=True)
    return out[:length]


@pytest.mark.parametrize("quantum", [1 << 20, 96])
def test_mixture_is_the_naive_one_in_any_order(
    folders: list[Path], quantum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small rounds hold less than one document, and none where one fills several."""
    monkeypatch.setattr("ringattn.launch.mixture._ROUND", quantum)
    # In units of the quantum these weights are exact, so that both order alike.
    weights = [64.0, 24.0, 8.0]
    length = 6000
    naive = naive_mixture(folders, weights, 5, length)
    dataset = PackedDataset(list(zip(folders, weights, strict=True)), "train", 64, seed=5)
    rng = np.random.default_rng(0)
    for start in [0, *rng.integers(0, length - 300, 60).tolist(), 3]:
        size = int(rng.integers(1, 300))
        pack = dataset.read(start, size)
        want = naive[start : start + size]
        assert pack.tokens.tolist() == [token for token, _ in want], start
        assert pack.labels.tolist() == [label for _, label in want], start
        assert sum(pack.lengths) == size
        assert dataset.valid_tokens(start, size) == (pack.labels != IGNORE).sum()
        ends = np.cumsum(pack.lengths)[:-1]
        assert set(ends - 1) == set(np.flatnonzero(pack.labels[:-1] == IGNORE).tolist())


def test_shares_and_epochs_of_each_corpus(folders: list[Path]) -> None:
    streams = [DocumentStream([folder], "train", 1) for folder in folders]
    mixture = MixtureStream(streams, WEIGHTS)
    length = 40_000
    tokens = dict.fromkeys(folders, 0)
    owner = {bytes(d[:-1]): f for f in folders for d in stored_documents(f, "train")}
    seen: dict[Path, list[bytes]] = {folder: [] for folder in folders}
    position = 0
    while position < length:
        ids, label = mixture.segment(position, 10_000)
        assert label == IGNORE  # whole documents
        text = bytes(ids[:-1].tolist())
        seen[owner[text]].append(text)
        tokens[owner[text]] += len(ids)
        position += len(ids)
    longest = max(len(text) + 1 for text in owner)
    for folder, weight in zip(folders, WEIGHTS, strict=True):
        assert abs(tokens[folder] - weight / sum(WEIGHTS) * position) <= 2 * longest
        count = len(stored_documents(folder, "train"))
        epochs = [seen[folder][i : i + count] for i in range(0, len(seen[folder]), count)]
        assert len(epochs) > 2
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)


def test_curriculum_over_a_mixture_loses_and_repeats_nothing(folders: list[Path]) -> None:
    """Lengths change, the run is cut and goes on with other ranks: the stream, once."""
    mixture = list(zip(folders, WEIGHTS, strict=True))
    dataset = PackedDataset(mixture, "train", 64, seed=2)
    stages = ((0, 16), (3, 50), (5, 200))
    first = Batches(stages=stages, dp=2)
    second = Batches(stages=stages, dp=1, accumulate=3, origin_step=4, origin=first.position(4))
    read: list[int] = []
    for batches, steps in ((first, range(4)), (second, range(4, 7))):
        again = PackedDataset(mixture, "train", 999, seed=2)  # another process, another length
        for step in steps:
            for start in batches.starts(step).flat:
                read += again.read(int(start), batches.seq_len(step)).tokens.tolist()
    assert len(read) == 2 * (3 * 16 + 50) + 3 * (50 + 2 * 200)
    assert read == dataset.read(0, len(read)).tokens.tolist()


def test_long_documents_repeat_exactly(folders: list[Path]) -> None:
    folder = folders[1]
    documents = stored_documents(folder, "train")
    lengths = sorted(map(len, documents))
    edge = lengths[len(lengths) // 2]
    dataset = PackedDataset(folder, "train", 64, seed=3, long_document=edge, long_repeats=3)
    wanted = Counter({bytes(d[:-1]): 3 if len(d) >= edge else 1 for d in documents})
    assert dataset.tokens == sum(len(text) * n + n for text, n in wanted.items())
    for epoch in range(2):
        tokens = dataset.read(epoch * dataset.tokens, dataset.tokens).tokens
        ends = np.flatnonzero(tokens == 256).tolist()
        found = Counter(
            bytes(tokens[a + 1 : b].tolist()) for a, b in zip([-1, *ends], ends, strict=False)
        )
        assert found == wanted
    order = [dataset.read(0, dataset.tokens).tokens, dataset.read(dataset.tokens, dataset.tokens)]
    assert (order[0] != order[1].tokens).any()


def test_long_means_the_whole_document_and_only_in_training(folders: list[Path]) -> None:
    folder = folders[1]
    documents = stored_documents(folder, "train")
    edge = sorted(map(len, documents))[-2]
    cut = DocumentStream([folder], "train", max_document=10, long_document=edge, long_repeats=2)
    assert cut.tokens == sum(len(d) * (2 if len(d) >= edge else 1) for d in documents)


def test_heldout_of_a_mixture_is_every_held_out_token_once(
    folders: list[Path], tmp_path: Path
) -> None:
    held = small_corpus(tmp_path, holdout=0.5)
    dataset = PackedDataset([(folders[0], 1.0), (held, 9.0)], "heldout", 50, long_repeats=4,
                            long_document=1)  # fmt: skip
    wanted = Counter(t for d in stored_documents(held, "heldout") for t in d[1:])
    found: Counter[int] = Counter()
    for index in range(dataset.packs + 1):
        found.update(label for label in dataset.pack(index).labels.tolist() if label != IGNORE)
    assert found == wanted


def test_boundaries_and_pieces(folders: list[Path]) -> None:
    stream = DocumentStream([folders[0]], "train", 4)
    length = 3 * stream.tokens
    pieces = stream.pieces(0, length)
    starts = pieces.start.tolist()
    assert starts[0] == 0
    assert (pieces.start[1:] == (pieces.start + pieces.length)[:-1]).all()
    for position in range(0, length - stream.tokens, 37):
        assert stream.boundary(position) == starts[bisect.bisect_left(starts, position)]
    assert len(stream.pieces(7, 7).start) == 0


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    streams = [DocumentStream([folder], "train") for folder in folders]
    for weights in ([1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0, float("inf")]):
        with pytest.raises(UserError, match="positive"):
            MixtureStream(streams, weights)
    with pytest.raises(UserError, match="smallest"):
        MixtureStream(streams, [1.0, 1.0, 1e-9])
    with pytest.raises(UserError, match=r"data\.long_repeats=0"):
        PackedDataset(folders[0], "train", 8, long_repeats=0)


def test_corpora_of_different_tokenizers_are_refused_by_name(
    folders: list[Path], tmp_path: Path
) -> None:
    other = small_corpus(tmp_path)
    meta = (other / "meta.json").read_text()
    (other / "meta.json").write_text(meta.replace('"vocab_size": 257', '"vocab_size": 300'))
    with pytest.raises(UserError, match=rf"data\.mixture: {other} has the tokenizer.*300 tokens"):
        PackedDataset([(folders[0], 1.0), (other, 1.0)], "train", 8)
