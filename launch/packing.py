"""Documents packed into sequences of exactly seq_len tokens, without padding.

The documents of a split are shuffled by (seed, epoch) and laid end to end, epoch after epoch, into
one endless stream. Pack i is the stream's tokens [i * seq_len, (i + 1) * seq_len). So what a pack
holds depends on (seed, i) alone, and every token appears exactly once per epoch. A document cut at
the end of a pack goes on in the next one as a segment of its own.
"""

from bisect import bisect_right
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
        labels: int64 (seq_len,): the next token of the same document, or `IGNORE`. Shifted on the
            whole stream, so the last position is labelled by the first token of the next pack.
        lengths: document segment lengths in order; their sum is seq_len.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: list[int]


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # document number at each place of the epoch
    ends: np.ndarray  # int64, stream position after each of them, counted from the epoch's start


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

    def __init__(self, path: str | Path, split: str, seq_len: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r}", "is no split", f"use one of {', '.join(SPLITS)}")
        if seq_len < 1:
            raise UserError(f"data.seq_len={seq_len}", "must be positive", "use 1 or more")
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
        lengths = [np.diff(offsets) for offsets in self._offsets]
        self._doc_lengths = np.concatenate(lengths)
        self._first_doc = np.cumsum([0] + [len(part) for part in lengths]).tolist()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def pack(self, index: int) -> Pack:
        """The pack at `index` >= 0, a pure function of (seed, index).

        Raises:
            UserError: a token id outside the vocabulary, naming file and document.
        """
        begin = index * self.seq_len
        tokens = np.empty(self.seq_len + 1, np.int64)  # one more, for the last label
        lengths: list[int] = []
        last: list[int] = []  # places of the documents' last tokens
        filled = 0
        while filled <= self.seq_len:
            ids, left = self._document_at(begin + filled, self.seq_len + 1 - filled)
            if filled < self.seq_len:
                lengths.append(min(len(ids), self.seq_len - filled))
            tokens[filled : filled + len(ids)] = ids
            filled += len(ids)
            if len(ids) == left and filled <= self.seq_len:
                last.append(filled - 1)
        labels = tokens[1:].copy()
        labels[last] = IGNORE
        if self.split == "heldout":
            labels[max(0, self.tokens - begin) :] = IGNORE
        return Pack(tokens[:-1], labels, lengths)

    def valid_tokens(self, index: int) -> int:
        """Labels of the pack at `index` that are not `IGNORE`, without reading its tokens."""
        begin, end = index * self.seq_len, (index + 1) * self.seq_len
        if self.split == "heldout":
            end = min(end, self.tokens)
        valid = max(end - begin, 0)
        while begin < end:  # less one for each document whose last token lies in the pack
            number, at = divmod(begin, self.tokens)
            upto = min(self.tokens, at + end - begin)
            ends = self._epoch(number).ends
            valid -= int(np.searchsorted(ends, upto, "right") - np.searchsorted(ends, at, "right"))
            begin += upto - at
        return valid

    def _document_at(self, position: int, most: int) -> tuple[np.ndarray, int]:
        """Up to `most` tokens of the document at a stream position, and how many it has left."""
        number, at = divmod(position, self.tokens)
        epoch = self._epoch(number)
        place = int(np.searchsorted(epoch.ends, at, side="right"))
        document, left = int(epoch.order[place]), int(epoch.ends[place]) - at
        shard = bisect_right(self._first_doc, document) - 1
        offsets = self._offsets[shard]
        stop = int(offsets[document - self._first_doc[shard] + 1])
        start = stop - left
        ids = self._maps[shard][start : min(stop, start + most)]
        path = shard_paths(self.path, self._shards[shard].name)[0]
        check_ids(ids, start, offsets, path, self.vocab_size)
        return ids, left

    def _epoch(self, number: int) -> _Epoch:
        if self.split == "heldout":
            number = 0
        if number not in self._epochs:
            order = np.arange(len(self._doc_lengths))
            if self.split == "train":
                np.random.Generator(np.random.PCG64([self.seed, number])).shuffle(order)
            self._epochs[number] = _Epoch(order, np.cumsum(self._doc_lengths[order]))
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
