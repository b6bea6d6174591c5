"""Shards that vanish or change while they are read: errors that name them, never a signal."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch import shard_files
from ringattn.launch.corpus import DataError
from ringattn.launch.data_loader import Loader
from ringattn.launch.document_stream import DocumentStream
from ringattn.launch.packing import Batches, PackedDataset
from tests.launch.corpora import small_corpus, stored_documents

STAGES = ((0, 48),)


def at_another_time(path: Path) -> None:
    """Changes a file's time as a later write would."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def cut(path: Path) -> None:
    os.truncate(path, 20)


def overwrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[::-1])
    at_another_time(path)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (Path.unlink, "the file is missing"),
    "cut short": (cut, "has been changed since"),
    "overwritten": (overwrite, "has been changed since"),
    "unreadable": (lambda path: (path.unlink(), path.mkdir())[1], "changed since|cannot be read"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_shard_is_named(change: str, tmp_path: Path) -> None:
    folder = small_corpus(tmp_path)
    documents = [len(d) for d in stored_documents(folder, "train")]
    dataset = PackedDataset(folder, "train", sum(documents))
    dataset.pack(0)
    act, says = CHANGES[change]
    act(folder / "train-00001.bin")
    with pytest.raises(DataError, match=rf"train-00001\.bin: document \d+, token \d+: .*({says})"):
        dataset.pack(1)


def test_a_file_that_ends_early_after_it_was_looked_at(tmp_path: Path) -> None:
    """What a map would answer with a signal."""
    folder = small_corpus(tmp_path, shard_tokens=10**6)
    dataset = PackedDataset(folder, "heldout", 30)
    dataset.pack(0)
    cut(folder / "heldout-00000.bin")
    stream = dataset._stream
    with pytest.raises(
        DataError, match=r"heldout-00000\.bin: document \d, token 10: .* ends there"
    ):
        stream.segment(0, 30)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_is_named_and_may_pass(number: int, tmp_path: Path) -> None:
    folder = small_corpus(tmp_path, shard_tokens=10**6)
    dataset = PackedDataset(folder, "train", 40)
    want = dataset.pack(0).tokens
    with (
        mock.patch.object(
            shard_files.os, "pread", side_effect=OSError(number, os.strerror(number))
        ),
        pytest.raises(DataError, match=rf"train-00000\.bin: document .*{os.strerror(number)}"),
    ):
        dataset.pack(0)
    assert (dataset.pack(0).tokens == want).all()


def test_an_equal_copy_may_take_a_shards_place(tmp_path: Path) -> None:
    folder = small_corpus(tmp_path, shard_tokens=10**6)
    dataset = PackedDataset(folder, "train", 400)
    want = dataset.pack(0).tokens
    path = folder / "train-00000.bin"
    shutil.copy2(path, tmp_path / "copy")
    (tmp_path / "copy").rename(path)
    assert (dataset.pack(0).tokens == want).all()


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_FILES_OPEN", 2)
    folder = small_corpus(tmp_path, shard_tokens=60)
    stored = stored_documents(folder, "heldout")
    tokens = sum(len(document) for document in stored)
    dataset = PackedDataset(folder, "heldout", tokens)
    assert len(list(folder.glob("heldout-*.bin"))) > 2
    assert dataset.pack(0).tokens.tolist() == [token for d in stored for token in d]
    stream = dataset._stream
    assert isinstance(stream, DocumentStream)
    files = list(stream._files._open.values())
    assert len(files) == 2
    del dataset, stream
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_reads_in_pieces_are_whole(tmp_path: Path) -> None:
    folder = small_corpus(tmp_path, shard_tokens=10**6)
    dataset = PackedDataset(folder, "train", 400)
    want = dataset.pack(0).tokens
    pread = os.pread

    def few_bytes(file: int, count: int, offset: int) -> bytes:
        return pread(file, min(count, 3), offset)

    with mock.patch.object(shard_files.os, "pread", few_bytes):
        assert np.array_equal(dataset.pack(0).tokens, want)


def test_the_loader_hands_out_what_cannot_be_read(tmp_path: Path) -> None:
    """And goes on: with what can be read again as with what comes after."""
    folder = small_corpus(tmp_path, shard_tokens=10**6)
    dataset = PackedDataset(folder, "train", 48)
    path, aside = folder / "train-00000.bin", tmp_path / "aside"

    def moved_by_step(lengths: list[int]) -> int:
        step = moves.pop(0)
        if step == 0:
            path.rename(aside)
        return step

    moves = [0, 1]
    read = dataset.read

    def put_back(start: int, seq_len: int) -> object:
        if start == 96:
            aside.rename(path)
        return read(start, seq_len)

    with (
        mock.patch.object(dataset, "read", put_back),
        Loader(
            dataset, Batches(stages=STAGES), moved_by_step, stop_step=3, keep_errors=True
        ) as loader,
    ):
        steps = list(loader)
    assert [step.step for step in steps] == [0, 1, 2]
    assert [step.error is None for step in steps] == [True, False, True]
    assert [len(step.micro) for step in steps] == [1, 0, 1]
    assert "train-00000.bin: document" in str(steps[1].error)
    assert all(step.valid_tokens > 0 for step in steps)


def test_what_is_no_data_error_is_raised(tmp_path: Path) -> None:
    dataset = PackedDataset(small_corpus(tmp_path), "train", 48)

    def refuse(lengths: list[int]) -> None:
        raise UserError("parallel.cp=3", "is odd", "use 2")

    with (
        Loader(dataset, Batches(stages=STAGES), refuse, stop_step=3, keep_errors=True) as loader,
        pytest.raises(UserError, match=r"parallel\.cp=3"),
    ):
        next(loader)
