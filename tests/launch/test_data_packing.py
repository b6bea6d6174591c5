"""Packs: nothing lost, nothing doubled, labels inside documents, position a pure function."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch.packing import IGNORE, Batches, PackedDataset
from tests.launch.corpora import small_corpus, stored_documents

SEQ_LENS = [1, 7, 64, 333, 5000]  # the last exceeds the corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("packing"))


Place = tuple[int, int, bool]


def naive_pieces(documents: list[list[int]], most: int) -> list[list[Place]]:
    """(token, label, piece ends here) of every token, piece by piece."""
    pieces = []
    for ids in documents:
        labels = [*ids[1:], IGNORE]
        for a in range(0, len(ids), most):
            b = min(a + most, len(ids))
            pieces.append([(ids[i], labels[i], i == b - 1) for i in range(a, b)])
    return pieces


def naive_stream(dataset: PackedDataset, pieces: list[list[Place]], length: int) -> list[Place]:
    """The first `length` places of the stream, piece by piece."""
    stream: list[Place] = []
    number = 0
    while len(stream) < length:
        order = np.arange(len(pieces))
        if dataset.split == "train":
            np.random.Generator(np.random.PCG64([dataset.seed, number])).shuffle(order)
        repeated = number > 0 and dataset.split == "heldout"
        for piece in order:
            stream += [(t, IGNORE if repeated else label, e) for t, label, e in pieces[piece]]
        number += 1
    return stream[:length]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("seq_len", SEQ_LENS)
@pytest.mark.parametrize("most", [None, 2, 17])
def test_packs_equal_a_naive_stream(
    folder: Path, split: str, seq_len: int, most: int | None
) -> None:
    dataset = PackedDataset(folder, split, seq_len, seed=5, max_document=most)
    count = min(2 * dataset.packs + 3, 700)
    pieces = naive_pieces(stored_documents(folder, split), most or 10**9)
    stream = naive_stream(dataset, pieces, count * seq_len)
    for index in range(count):
        pack = dataset.pack(index)
        wanted = stream[index * seq_len : (index + 1) * seq_len]
        assert pack.tokens.tolist() == [token for token, _, _ in wanted], f"pack {index}"
        assert pack.labels.tolist() == [label for _, label, _ in wanted], f"pack {index}"
        assert pack.tokens.dtype == pack.labels.dtype == np.int64
        ends = [place for place, (_, _, last) in enumerate(wanted, start=1) if last]
        assert np.cumsum(pack.lengths).tolist() == sorted({*ends, seq_len}), f"pack {index}"
        assert dataset.valid_tokens(index * seq_len, seq_len) == (pack.labels != IGNORE).sum(), (
            f"pack {index}"
        )


def test_every_token_once_per_epoch_and_a_new_order(folder: Path) -> None:
    dataset = PackedDataset(folder, "train", 1, seed=2)
    tokens = [int(dataset.pack(i).tokens[0]) for i in range(2 * dataset.tokens)]
    documents = stored_documents(folder, "train")
    wanted = Counter(token for doc in documents for token in doc)
    epochs = [tokens[: dataset.tokens], tokens[dataset.tokens :]]
    assert [Counter(epoch) for epoch in epochs] == [wanted, wanted]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("most", [None, 9])
def test_heldout_counts_each_target_once(folder: Path, most: int | None) -> None:
    documents = stored_documents(folder, "heldout")
    wanted = Counter(token for doc in documents for token in doc[1:])
    dataset = PackedDataset(folder, "heldout", 50, max_document=most)
    found: Counter[int] = Counter()
    for index in range(dataset.packs + 2):  # two packs beyond the end count nothing
        found.update(label for label in dataset.pack(index).labels.tolist() if label != IGNORE)
    assert found == wanted


def test_position_is_a_pure_function(folder: Path) -> None:
    forwards = PackedDataset(folder, "train", 64, seed=1)
    packs = [forwards.pack(i) for i in range(60)]
    resumed = PackedDataset(folder, "train", 64, seed=1)
    for index in (59, 3, 31):  # out of order, in a fresh object
        assert (resumed.pack(index).tokens == packs[index].tokens).all()
        assert resumed.pack(index).lengths == packs[index].lengths
    other = PackedDataset(folder, "train", 64, seed=2)
    assert (other.pack(0).tokens != packs[0].tokens).any()


@pytest.mark.parametrize("dp, accumulate, batch", [(1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)])
def test_any_dp_size_reads_the_same_steps(dp: int, accumulate: int, batch: int) -> None:
    batches = Batches(stages=((0, 10),), dp=dp, accumulate=accumulate, batch=batch)
    assert batches.per_step == 8
    for step in (0, 5):
        starts = batches.starts(step)
        assert starts.shape == (accumulate, dp, batch)
        assert sorted(starts.flat) == list(range(80 * step, 80 * step + 80, 10))


def test_resume_with_another_step_size_skips_and_repeats_nothing() -> None:
    stages = ((0, 3), (2, 5), (7, 2))
    before = Batches(stages=stages, dp=2, accumulate=2)
    after = Batches(stages=stages, dp=3, origin_step=5, origin=before.position(5))
    read: list[int] = []
    for batches, steps in ((before, range(5)), (after, range(5, 9))):
        for step in steps:
            assert batches.position(step) == len(read)
            assert batches.tokens(step) == batches.per_step * batches.seq_len(step)
            for start in batches.starts(step).flat:
                read += range(start, start + batches.seq_len(step))
    assert read == list(range(len(read)))
    assert len(read) == 4 * (2 * 3 + 3 * 5) + 3 * (2 * 5 + 2 * 2)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split='test'"):
        PackedDataset(folder, "test", 8)
    with pytest.raises(UserError, match=r"data\.seq_len=0"):
        PackedDataset(folder, "train", 0)
    with pytest.raises(UserError, match=r"data\.max_document=1"):
        PackedDataset(folder, "train", 8, max_document=1)
    with pytest.raises(UserError, match="seed=-1"):
        PackedDataset(folder, "train", 8, seed=-1)
    with pytest.raises(UserError, match="accumulate=0"):
        Batches(stages=((0, 8),), accumulate=0)
    whole = small_corpus(tmp_path, holdout=0)
    with pytest.raises(UserError, match="no token in the split 'heldout'"):
        PackedDataset(whole, "heldout", 8)
