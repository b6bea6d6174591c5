"""Token ids read from shards that may vanish or change while a run reads them.

Files are read, not mapped: a page of a map that cannot be read (a file cut short, a disk or a
server gone) ends the process by a signal, without a word about which file it was.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringattn.launch.corpus import DataError, check_ids

_FILES_OPEN = 64
_FIX = (
    "restore the file and resume from the last checkpoint, or leave such steps out with "
    "faults.on_data_error=skip"
)


@dataclass(frozen=True)
class Shard:
    """One shard of a stream.

    Attributes:
        path: of its token ids. dtype: of an id in the file.
        offsets: int64 (documents + 1,), first token of each document, then the total.
        vocab: ids are below it.
    """

    path: Path
    dtype: np.dtype
    offsets: np.ndarray
    vocab: int


class ShardFiles:
    """Reads shards by number; keeps the files it used last open. For one thread at a time.

    Args:
        shards: their files are looked at here: from now on they must stay as they are.

    Raises:
        DataError: a file is not there.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._open: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close, self._open)
        self._looked: set[int] = set()
        self._inodes: dict[int, int] = {}
        self._marks = [self._mark(number, 0) for number in range(len(self._shards))]

    def recheck(self) -> None:
        """Each file is looked at again when it is read next."""
        self._looked.clear()

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a shard, in the file's dtype.

        Raises:
            DataError: naming file, document and token: the file is gone, has changed, is too short
                or cannot be read, or an id lies outside the vocabulary.
        """
        shard = self._shards[number]
        if number not in self._looked:
            self._look(number, start)
        size = shard.dtype.itemsize
        data, wanted = b"", (stop - start) * size
        while len(data) < wanted:
            try:
                file = self._file(number)
                piece = os.pread(file, wanted - len(data), start * size + len(data))
            except OSError as error:
                raise self._error(number, start, _reason(error)) from None
            if not piece:
                read = len(data) // size
                raise self._error(number, start + read, "the file ends there")
            data = data + piece if data else piece
        ids = np.frombuffer(data, shard.dtype)
        check_ids(ids, start, shard.offsets, shard.path, shard.vocab)
        return ids

    def _look(self, number: int, token: int) -> None:
        """Refuses a file that is not the one that was there at the beginning."""
        inode = self._inodes[number]
        if self._mark(number, token) != self._marks[number]:
            rule = "the file has been changed since the run opened it"
            raise self._error(number, token, rule)
        if self._inodes[number] != inode:  # an equal copy took its place
            self._forget(number)
        self._looked.add(number)

    def _mark(self, number: int, token: int) -> tuple[int, int]:
        """What changes when a file does: its size and time."""
        try:
            found = os.stat(self._shards[number].path)
        except OSError as error:
            self._forget(number)
            raise self._error(number, token, _reason(error)) from None
        self._inodes[number] = found.st_ino
        return found.st_size, found.st_mtime_ns

    def _file(self, number: int) -> int:
        """The open file of a shard."""
        if number not in self._open:
            while len(self._open) >= _FILES_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self._shards[number].path, os.O_RDONLY)
        self._open.move_to_end(number)
        return self._open[number]

    def _forget(self, number: int) -> None:
        if number in self._open:
            os.close(self._open.pop(number))

    def _error(self, number: int, token: int, rule: str) -> DataError:
        self._forget(number)
        self._looked.discard(number)
        shard = self._shards[number]
        document = int(np.searchsorted(shard.offsets, token, side="right")) - 1
        return DataError(f"{shard.path}: document {document}, token {token}", rule, _FIX)


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    return f"cannot be read ({error.strerror or error})"


def _close(files: OrderedDict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
