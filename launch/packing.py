"""Documents packed into sequences of exactly seq_len tokens, without padding.

The documents of a split are shuffled by (seed, epoch) and laid end to end, epoch after epoch, into
one endless stream. Pack i is the stream's tokens [i * seq_len, (i + 1) * seq_len). So what a pack
holds depends on (seed, i) alone, and every token appears exactly once per epoch. A document cut at
the end of a pack goes on in the next one as a segment of its own.

With `max_document`, longer documents are first cut into pieces of that many tokens, which are
shuffled like documents. A token still has the label it has in the whole document.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import (
    SPLITS,
    check_ids,
    load_corpus_tokenizer,
    load_meta,
    open_shard,
    shard_paths,
)
from ringattn.launch.tokenizer import Tokenizer

IGNORE = -100
"""Label of a position whose next token belongs to another document."""

_EPOCHS_KEPT = 3


@dataclass(frozen=True)
class Pack:
    """One sequence.

    Attributes:
        tokens: int64 (seq_len,).
        labels: int64 (seq_len,): the next token of the same document, or `IGNORE` at its end.
            Taken from the document, so the last token of a segment that was cut has a label too.
        lengths: document segment lengths in order; their sum is seq_len.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: list[int]


@dataclass(frozen=True)
class _Pieces:
    """What is shuffled: the split's documents, or pieces of them, in stored order."""

    shard: np.ndarray  # number of the shard
    start: np.ndarray  # first token in it
    length: np.ndarray
    ends_document: np.ndarray  # bool: the piece is its document's last

    @classmethod
    def cut(cls, offsets: list[np.ndarray], most: int | None) -> "_Pieces":
        """Pieces of at most `most` tokens of the documents at `offsets` of each shard."""
        start = np.concatenate([part[:-1] for part in offsets])
        stop = np.concatenate([part[1:] for part in offsets])
        shard = np.repeat(np.arange(len(offsets)), [len(part) - 1 for part in offsets])
        if most is None:
            return cls(shard, start, stop - start, np.ones(len(start), bool))
        count = -(-(stop - start) // most)
        first = np.cumsum(count) - count
        within = np.arange(count.sum()) - np.repeat(first, count)
        begin = np.repeat(start, count) + most * within
        end = np.repeat(stop, count)
        length = np.minimum(end - begin, most)
        return cls(np.repeat(shard, count), begin, length, begin + length == end)


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # piece number at each place of the epoch
    ends: np.ndarray  # int64, stream position after each of them, counted from the epoch's start
    documents: np.ndarray  # int64 (places + 1,), documents ended before each place


class PackedDataset:
    """Packs of one split of a prepared corpus.

    The training split is endless: any index >= 0. The held-out split is read once in its stored
    order: `packs` packs cover it, and positions after its end repeat tokens under `IGNORE` labels,
    so that a loss summed over indices 0 .. packs - 1 (or beyond) counts each of its tokens once.

    Args:
        path: folder written by `prepare`.
        split: "train" or "heldout".
        seq_len: tokens of a pack.
        seed: of the shuffle; the held-out split does not use it.
        max_document: documents are cut into pieces of at most this many tokens; None keeps them
            whole. Shorter pieces mix more documents into a pack, and limit the context.

    Attributes:
        meta: the corpus's `CorpusMeta`.
        tokenizer: the corpus's tokenizer.
        vocab_size: of the corpus.
        tokens: tokens of the split = length of one epoch.
        packs: ceil(tokens / seq_len).

    Raises:
        UserError: bad files (missing, truncated, of another version), an empty split, or seq_len
            < 1. Checksums are not compared here; `check_corpus` does that.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        seq_len: int,
        seed: int = 0,
        *,
        max_document: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r}", "is no split", f"use one of {', '.join(SPLITS)}")
        if seq_len < 1:
            raise UserError(f"data.seq_len={seq_len}", "must be positive", "use 1 or more")
        if max_document is not None and max_document < 2:
            raise UserError(
                f"data.max_document={max_document}",
                "must be at least 2 tokens, or null for whole documents",
                "use 2048",
            )
        if seed < 0:
            raise UserError(f"seed={seed}", "must not be negative", "use 0 or more")
        self.path, self.split, self.seq_len, self.seed = Path(path), split, seq_len, seed
        self.meta = load_meta(path)
        self.vocab_size = self.meta.vocab_size
        self.tokenizer: Tokenizer = load_corpus_tokenizer(path, self.meta)
        self._shards = self.meta.split(split)
        opened = [open_shard(path, self.meta, shard) for shard in self._shards]
        self._maps = [tokens for tokens, _ in opened]
        self._offsets = [offsets for _, offsets in opened]
        self.tokens = sum(len(tokens) for tokens in self._maps)
        if self.tokens == 0:
            raise UserError(
                f"data.path={str(path)!r}",
                f"has no token in the split {split!r}",
                "prepare it again from more documents or with another holdout share",
            )
        self.packs = -(-self.tokens // seq_len)
        self._pieces = _Pieces.cut(self._offsets, max_document)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def pack(self, index: int) -> Pack:
        """The pack at `index` >= 0, a pure function of (seed, index).

        Raises:
            UserError: a token id outside the vocabulary, naming file and document.
        """
        begin = index * self.seq_len
        tokens = np.empty(self.seq_len, np.int64)
        labels = np.empty(self.seq_len, np.int64)
        lengths: list[int] = []
        filled = 0
        while filled < self.seq_len:
            ids, following = self._segment(begin + filled, self.seq_len - filled)
            end = filled + len(ids)
            tokens[filled:end] = ids
            labels[filled : end - 1] = ids[1:]
            labels[end - 1] = following
            lengths.append(len(ids))
            filled = end
        if self.split == "heldout":
            labels[max(0, self.tokens - begin) :] = IGNORE
        return Pack(tokens, labels, lengths)

    def lengths(self, index: int) -> list[int]:
        """Document segment lengths of the pack at `index`, without reading its tokens."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        found: list[int] = []
        while begin < end:
            number, at = divmod(begin, self.tokens)
            ends = self._epoch(number).ends
            place = int(np.searchsorted(ends, at, side="right"))
            found.append(min(int(ends[place]) - at, end - begin))
            begin += found[-1]
        return found

    def valid_tokens(self, index: int) -> int:
        """Labels of the pack at `index` that are not `IGNORE`, without reading its tokens."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        if self.split == "heldout":
            end = min(end, self.tokens)
        valid = max(end - begin, 0)
        while begin < end:  # less one for each document whose last token lies in the pack
            number, at = divmod(begin, self.tokens)
            upto = min(self.tokens, at + end - begin)
            epoch = self._epoch(number)
            places = np.searchsorted(epoch.ends, (at, upto), side="right")
            valid -= int(np.diff(epoch.documents[places])[0])
            begin += upto - at
        return valid

    def _segment(self, position: int, most: int) -> tuple[np.ndarray, int]:
        """Up to `most` tokens of the piece at a stream position, and the label of the last."""
        number, at = divmod(position, self.tokens)
        epoch = self._epoch(number)
        place = int(np.searchsorted(epoch.ends, at, side="right"))
        piece = int(epoch.order[place])
        left = int(epoch.ends[place]) - at
        shard = int(self._pieces.shard[piece])
        stop = int(self._pieces.start[piece] + self._pieces.length[piece])
        start, end = stop - left, min(stop, stop - left + most)
        whole = end == stop and bool(self._pieces.ends_document[piece])
        ids = self._maps[shard][start : end if whole else end + 1]
        path = shard_paths(self.path, self._shards[shard].name)[0]
        check_ids(ids, start, self._offsets[shard], path, self.vocab_size)
        return (ids, IGNORE) if whole else (ids[:-1], int(ids[-1]))

    def _epoch(self, number: int) -> _Epoch:
        if self.split == "heldout":
            number = 0
        if number not in self._epochs:
            order = np.arange(len(self._pieces.length))
            if self.split == "train":
                np.random.Generator(np.random.PCG64([self.seed, number])).shuffle(order)
            documents = np.cumsum(self._pieces.ends_document[order])
            self._epochs[number] = _Epoch(
                order, np.cumsum(self._pieces.length[order]), np.concatenate([[0], documents])
            )
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Which packs each step, micro-batch and data-parallel rank reads: a pure function of step.

    One step reads `per_step` consecutive packs. Micro-batch m of dp rank r holds packs
    first + (m * dp + r) * batch ... + batch, so dp and accumulate may trade against each other
    without changing which packs a step reads.

    Attributes:
        batch: packs of one micro-batch of one dp rank.
        dp: data-parallel ranks.
        accumulate: micro-batches per step.
        origin_step, origin_pack: the first pack of step `origin_step`; set both when a run is
            resumed with another `per_step`, to `position` of the run that was saved.
    """

    batch: int = 1
    dp: int = 1
    accumulate: int = 1
    origin_step: int = 0
    origin_pack: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "dp", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}", "must be positive", "use 1")

    @property
    def per_step(self) -> int:
        """Packs read by one step over all ranks and micro-batches."""
        return self.batch * self.dp * self.accumulate

    def position(self, step: int) -> int:
        """Packs read before `step`: the position in the data to save."""
        return self.origin_pack + (step - self.origin_step) * self.per_step

    def indices(self, step: int) -> np.ndarray:
        """Pack indices of `step`, int64 (accumulate, dp, batch)."""
        first = self.position(step)
        packs = np.arange(first, first + self.per_step, dtype=np.int64)
        return packs.reshape(self.accumulate, self.dp, self.batch)
