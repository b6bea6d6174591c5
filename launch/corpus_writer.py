"""Writes the shards of a corpus (format: `corpus`) one document at a time."""

import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import DTYPES, ShardMeta, file_crc32, shard_paths


class SplitWriter:
    """Writes the shards of one split; a shard is closed once it holds `shard_tokens` tokens.

    Attributes:
        lengths: documents by power of two: `lengths[p]` have 2^p <= length < 2^(p + 1).
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self.split, self.lengths = split, Counter[int]()
        self._folder, self._dtype, self._shard_tokens = folder, DTYPES[dtype], shard_tokens
        self._done: list[ShardMeta] = []
        self._file: BinaryIO | None = None
        self._offsets: list[int] = [0]
        self._crc = 0

    def add(self, ids: np.ndarray, eos_id: int) -> int:
        """Appends one document and its end-of-document token; returns their number."""
        if self._file is None:
            self._file = shard_paths(self._folder, self._name())[0].open("wb")
        data = np.append(ids, eos_id).astype(self._dtype).tobytes()
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        length = len(ids) + 1
        self._offsets.append(self._offsets[-1] + length)
        self.lengths[length.bit_length() - 1] += 1
        if self._offsets[-1] >= self._shard_tokens:
            self.close()
        return length

    def close(self) -> list[ShardMeta]:
        """Closes the open shard, if any, and returns all shards of the split so far."""
        if self._file is not None:
            self._file.close()
            index = shard_paths(self._folder, self._name())[1]
            np.save(index, np.array(self._offsets, np.int64), allow_pickle=False)
            self._done.append(
                ShardMeta(
                    split=self.split,
                    name=self._name(),
                    tokens=self._offsets[-1],
                    documents=len(self._offsets) - 1,
                    bin_crc32=self._crc,
                    idx_crc32=file_crc32(index),
                )
            )
            self._file, self._offsets, self._crc = None, [0], 0
        return self._done

    def _name(self) -> str:
        return f"{self.split}-{len(self._done):05d}"


@contextmanager
def new_corpus_folder(out: Path) -> Iterator[Path]:
    """A folder to write a corpus in, which becomes `out` at the end, whole or not at all.

    Raises:
        UserError: `out` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"out_dir={str(out)!r}",
            "already exists and is not empty",
            "name a new folder or remove it first",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp makes it private
        os.replace(work, out)  # atomic; an existing empty folder is replaced
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def length_histogram(lengths: dict[str, Counter[int]]) -> tuple[list[int], dict[str, list[int]]]:
    """Counts by power of two -> bin edges 1, 2, 4, ... and counts per split."""
    bins = 1 + max(power for counts in lengths.values() for power in counts)
    counts = {split: [found[power] for power in range(bins)] for split, found in lengths.items()}
    return [1 << power for power in range(bins + 1)], counts


def lengths_text(edges: list[int], counts: list[int]) -> str:
    """A histogram of document lengths as ``ringattn bench`` reads it (YAML): bins of
    [shortest, longest, documents], from bin edges in tokens and counts."""
    bins = zip(edges[:-1], edges[1:], counts, strict=True)
    rows = [f"  - [{low}, {high - 1}, {count}]" for low, high, count in bins if count]
    head = ["# Documents of the training split by tokens: [shortest, longest, documents].", "bins:"]
    return "\n".join([*head, *rows]) + "\n"
