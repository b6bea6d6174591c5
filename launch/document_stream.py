"""The documents of prepared corpora laid end to end into one endless stream of tokens.

The training split is shuffled by (seed, epoch), epoch after epoch; the held-out split keeps its
stored order. What stands at a position of the stream depends on (seed, position) alone.

With `max_document`, longer documents are first cut into pieces of that many tokens, which are
shuffled like documents. A token still has the label it has in the whole document. With
`long_document` and `long_repeats`, every training document of at least that many tokens occurs
`long_repeats` times in each epoch, at independent places; all others occur once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import DTYPES, SPLITS, load_meta, load_offsets, shard_paths
from ringattn.launch.shard_files import Shard, ShardFiles

IGNORE = -100
"""Label of a position whose next token belongs to another document."""

_EPOCHS_KEPT = 3


@dataclass(frozen=True)
class StreamPieces:
    """Consecutive pieces of a stream, each a document or, with `max_document`, a part of one.

    Attributes:
        start: int64, stream position of each piece's first token.
        length: int64, its tokens.
        ends_document: bool, whether its last token is its document's.
    """

    start: np.ndarray
    length: np.ndarray
    ends_document: np.ndarray


@dataclass(frozen=True)
class _Pieces:
    """What is shuffled: the split's documents, or pieces of them, in stored order."""

    shard: np.ndarray  # number of the shard
    start: np.ndarray  # first token in it
    length: np.ndarray
    ends_document: np.ndarray  # bool: the piece is its document's last
    document_length: np.ndarray  # of the whole document

    @classmethod
    def cut(cls, offsets: list[np.ndarray], most: int | None) -> "_Pieces":
        """Pieces of at most `most` tokens of the documents at `offsets` of each shard."""
        start = np.concatenate([part[:-1] for part in offsets])
        stop = np.concatenate([part[1:] for part in offsets])
        shard = np.repeat(np.arange(len(offsets)), [len(part) - 1 for part in offsets])
        if most is None:
            return cls(shard, start, stop - start, np.ones(len(start), bool), stop - start)
        count = -(-(stop - start) // most)
        first = np.cumsum(count) - count
        within = np.arange(count.sum()) - np.repeat(first, count)
        begin = np.repeat(start, count) + most * within
        end = np.repeat(stop, count)
        length = np.minimum(end - begin, most)
        whole = np.repeat(stop - start, count)
        return cls(np.repeat(shard, count), begin, length, begin + length == end, whole)


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # piece number at each place of the epoch
    ends: np.ndarray  # int64, stream position after each of them, counted from the epoch's start
    documents: np.ndarray  # int64 (places + 1,), documents ended before each place


class DocumentStream:
    """One split of one corpus, or of several after one another, as an endless stream.

    Args:
        folders: prepared corpora with one vocabulary.
        split: "train" or "heldout".
        seed: of the shuffle; the held-out split does not use it.
        max_document: documents are cut into pieces of at most this many tokens; None keeps them
            whole.
        long_document: training documents of at least so many tokens are repeated; None: none.
        long_repeats: how often those occur in an epoch.

    Attributes:
        tokens: length of one epoch, repeats counted.

    Raises:
        UserError: bad files, values out of range, or a split without any token.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        split: str,
        seed: int = 0,
        *,
        max_document: int | None = None,
        long_document: int | None = None,
        long_repeats: int = 1,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r}", "is no split", f"use one of {', '.join(SPLITS)}")
        if max_document is not None and max_document < 2:
            raise UserError(
                f"data.max_document={max_document}",
                "must be at least 2 tokens, or null for whole documents",
                "use 2048",
            )
        if seed < 0:
            raise UserError(f"seed={seed}", "must not be negative", "use 0 or more")
        if long_repeats < 1:
            raise UserError(f"data.long_repeats={long_repeats}", "must be positive", "use 1")
        self._split, self._seed = split, seed
        metas = [(folder, load_meta(folder)) for folder in folders]
        vocab = metas[0][1].vocab_size
        found = [(folder, meta, s) for folder, meta in metas for s in meta.split(split)]
        shards = [
            Shard(
                shard_paths(folder, s.name)[0],
                DTYPES[meta.dtype],
                load_offsets(folder, meta, s),
                vocab,
            )
            for folder, meta, s in found
        ]
        if not shards:
            raise UserError(
                f"data.path={str(folders[0])!r}",
                f"has no token in the split {split!r}",
                "prepare it again from more documents or with another holdout share",
            )
        self._files = ShardFiles(shards)
        self._pieces = _Pieces.cut([shard.offsets for shard in shards], max_document)
        repeats = np.ones(len(self._pieces.length), np.int64)
        if long_document is not None and split == "train":
            repeats[self._pieces.document_length >= long_document] = long_repeats
        self._stored = np.repeat(np.arange(len(repeats)), repeats)
        self.tokens = int((repeats * self._pieces.length).sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def segment(self, position: int, most: int) -> tuple[np.ndarray, int]:
        """Up to `most` tokens of the piece at a stream position, and the label of the last.

        Raises:
            DataError: they cannot be read or are no token ids, naming file and document.
        """
        number, at = divmod(position, self.tokens)
        epoch = self._epoch(number)
        place = int(np.searchsorted(epoch.ends, at, side="right"))
        piece = int(epoch.order[place])
        left = int(epoch.ends[place]) - at
        shard = int(self._pieces.shard[piece])
        stop = int(self._pieces.start[piece] + self._pieces.length[piece])
        start, end = stop - left, min(stop, stop - left + most)
        whole = end == stop and bool(self._pieces.ends_document[piece])
        ids = self._files.read(shard, start, end if whole else end + 1)
        return (ids, IGNORE) if whole else (ids[:-1], int(ids[-1]))

    def recheck(self) -> None:
        """Files are looked at again when they are read next: whether they are still the same."""
        self._files.recheck()

    def left(self, position: int) -> int:
        """Tokens of the piece at a stream position from there on."""
        number, at = divmod(position, self.tokens)
        ends = self._epoch(number).ends
        return int(ends[np.searchsorted(ends, at, side="right")]) - at

    def documents_ended(self, begin: int, end: int) -> int:
        """Documents whose last token lies in the stream's [begin, end)."""
        ended = 0
        while begin < end:
            number, at = divmod(begin, self.tokens)
            upto = min(self.tokens, at + end - begin)
            epoch = self._epoch(number)
            places = np.searchsorted(epoch.ends, (at, upto), side="right")
            ended += int(np.diff(epoch.documents[places])[0])
            begin += upto - at
        return ended

    def boundary(self, position: int) -> int:
        """Start of the first piece that starts at `position` or after it."""
        number, at = divmod(position, self.tokens)
        if at == 0:
            return position
        ends = self._epoch(number).ends
        return position - at + int(ends[np.searchsorted(ends, at, side="left")])

    def pieces(self, begin: int, end: int) -> StreamPieces:
        """The pieces between two boundaries."""
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        while begin < end:
            number, at = divmod(begin, self.tokens)
            upto = min(self.tokens, at + end - begin)
            epoch = self._epoch(number)
            a, b = np.searchsorted(epoch.ends, (at, upto), side="right")
            order = epoch.order[a:b]
            length = self._pieces.length[order]
            start = number * self.tokens + epoch.ends[a:b] - length
            found.append((start, length, self._pieces.ends_document[order]))
            begin += upto - at
        if not found:
            return StreamPieces(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
        start, length, ends = (np.concatenate(column) for column in zip(*found, strict=True))
        return StreamPieces(start, length, ends)

    def _epoch(self, number: int) -> _Epoch:
        if self._split == "heldout":
            number = 0
        if number not in self._epochs:
            order = self._stored.copy()
            if self._split == "train":
                np.random.Generator(np.random.PCG64([self._seed, number])).shuffle(order)
            documents = np.cumsum(self._pieces.ends_document[order])
            self._epochs[number] = _Epoch(
                order, np.cumsum(self._pieces.length[order]), np.concatenate([[0], documents])
            )
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]
