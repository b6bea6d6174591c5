"""Sequences of exactly so many tokens, without padding, cut from a stream of documents.

A sequence is the stream's tokens [start, start + seq_len): what it holds depends on the corpus, the
seed and those two numbers alone, and positions in the data are counted in tokens, so that lengths
may change between sequences without a token being read twice or left out. A document cut at the end
of a sequence goes on in the next one as a segment of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import load_corpus_tokenizer, load_meta, same_tokenizer
from ringattn.launch.document_stream import IGNORE, DocumentStream
from ringattn.launch.mixture import MixtureStream
from ringattn.launch.tokenizer import Tokenizer

__all__ = ["IGNORE", "Batches", "Pack", "PackedDataset"]


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


class PackedDataset:
    """Sequences of one split of a prepared corpus, or of several mixed by weight.

    The training split is endless: any position >= 0. The held-out split is read once in its stored
    order, corpus after corpus: `packs` packs cover it, and positions after its end repeat tokens
    under `IGNORE` labels, so that a loss summed over packs 0 .. packs - 1 (or beyond) counts each
    of its tokens once.

    Args:
        path: folder written by `prepare`, or (folder, weight) of each corpus of a mixture.
        split: "train" or "heldout"; weights do not matter to the latter, and corpora without a
            held-out document are left out.
        seq_len: tokens of a pack.
        seed: of the shuffle; the held-out split does not use it.
        max_document, long_document, long_repeats: as in `DocumentStream`. Pieces of at most
            max_document tokens mix more documents into a pack, and limit the context.

    Attributes:
        meta: the (first) corpus's `CorpusMeta`.
        tokenizer: the corpora's tokenizer.
        vocab_size: of the corpora.
        tokens: tokens of the split = length of one epoch, of a mixture that of all its corpora.
        packs: ceil(tokens / seq_len).

    Raises:
        UserError: bad files (missing, truncated, of another version), an empty split, values out of
            range, or corpora of different tokenizers. Checksums are not compared here;
            `check_corpus` does that.
    """

    def __init__(
        self,
        path: str | Path | Sequence[tuple[str | Path, float]],
        split: str,
        seq_len: int,
        seed: int = 0,
        *,
        max_document: int | None = None,
        long_document: int | None = None,
        long_repeats: int = 1,
    ) -> None:
        if seq_len < 1:
            raise UserError(f"data.seq_len={seq_len}", "must be positive", "use 1 or more")
        corpora = [(path, 1.0)] if isinstance(path, (str, Path)) else list(path)
        folders = [Path(folder) for folder, _ in corpora]
        self.path, self.split, self.seq_len, self.seed = folders[0], split, seq_len, seed
        self.meta = load_meta(folders[0])
        self.vocab_size = self.meta.vocab_size
        self.tokenizer: Tokenizer = load_corpus_tokenizer(folders[0], self.meta)
        check_one_tokenizer(folders)

        def stream(folders: list[Path]) -> DocumentStream:
            return DocumentStream(
                folders,
                split,
                seed,
                max_document=max_document,
                long_document=long_document,
                long_repeats=long_repeats,
            )

        self._stream: DocumentStream | MixtureStream
        if split == "train" and len(corpora) > 1:
            weights = [weight for _, weight in corpora]
            self._stream = MixtureStream([stream([folder]) for folder in folders], weights)
        else:
            self._stream = stream(folders)
        self.tokens = self._stream.tokens
        self.packs = -(-self.tokens // seq_len)

    def pack(self, index: int) -> Pack:
        """The pack at `index` >= 0: `read` of position index * seq_len.

        Raises:
            DataError: a shard has gone or changed, cannot be read or holds an id outside the
                vocabulary, naming file and document.
        """
        return self.read(index * self.seq_len, self.seq_len)

    def read(self, start: int, seq_len: int) -> Pack:
        """The stream's tokens [start, start + seq_len), a pure function of seed and arguments.

        Raises:
            DataError: a shard has gone or changed, cannot be read or holds an id outside the
                vocabulary, naming file and document.
        """
        tokens = np.empty(seq_len, np.int64)
        labels = np.empty(seq_len, np.int64)
        lengths: list[int] = []
        filled = 0
        self._stream.recheck()
        while filled < seq_len:
            ids, following = self._stream.segment(start + filled, seq_len - filled)
            end = filled + len(ids)
            tokens[filled:end] = ids
            labels[filled : end - 1] = ids[1:]
            labels[end - 1] = following
            lengths.append(len(ids))
            filled = end
        if self.split == "heldout":
            labels[max(0, self.tokens - start) :] = IGNORE
        return Pack(tokens, labels, lengths)

    def lengths(self, start: int, seq_len: int) -> list[int]:
        """Document segment lengths of `read(start, seq_len)`, without reading its tokens."""
        found: list[int] = []
        end = start + seq_len
        while start < end:
            found.append(min(self._stream.left(start), end - start))
            start += found[-1]
        return found

    def documents(self) -> list[tuple[int, int]]:
        """Position and tokens of every document of one epoch, in the stream's order.

        Of a mixture, whose stream has no epoch, there is no such list.
        """
        assert isinstance(self._stream, DocumentStream), "a mixture has no epoch"
        pieces = self._stream.pieces(0, self.tokens)
        return list(zip(pieces.start.tolist(), pieces.length.tolist(), strict=True))

    def valid_tokens(self, start: int, seq_len: int) -> int:
        """Labels of `read(start, seq_len)` that are not `IGNORE`, without reading its tokens."""
        end = start + seq_len
        if self.split == "heldout":
            end = min(end, self.tokens)
        # Less one for each document whose last token lies there.
        return max(end - start, 0) - self._stream.documents_ended(start, end)


def check_one_tokenizer(folders: Sequence[Path]) -> None:
    """Refuses corpora that were prepared with different tokenizers.

    Raises:
        UserError: naming two folders.
    """
    first = folders[0], load_meta(folders[0])
    for folder in folders[1:]:
        meta = load_meta(folder)
        if not same_tokenizer(*first, folder, meta):
            raise UserError(
                f"data.mixture: {folder} has the tokenizer {meta.tokenizer!r} of "
                f"{meta.vocab_size} tokens",
                f"{first[0]} has another ({first[1].tokenizer!r}, {first[1].vocab_size} tokens)",
                "prepare all corpora of a mixture with one --tokenizer",
            )


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Which tokens each step, micro-batch and data-parallel rank reads: a pure function of step.

    One step reads `per_step` consecutive packs of one length. Micro-batch m of dp rank r holds its
    packs number (m * dp + r) * batch ... + batch, so dp and accumulate may trade against each other
    without changing which tokens a step reads.

    Attributes:
        stages: (step, tokens of a pack from that step on), by rising step; the first is step 0.
        batch: packs of one micro-batch of one dp rank.
        dp: data-parallel ranks.
        accumulate: micro-batches per step.
        origin_step, origin: where step `origin_step` begins to read, in tokens of the stream; set
            both when a run is resumed, to `position` of the run that was saved.
    """

    stages: tuple[tuple[int, int], ...]
    batch: int = 1
    dp: int = 1
    accumulate: int = 1
    origin_step: int = 0
    origin: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "dp", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}", "must be positive", "use 1")

    @property
    def per_step(self) -> int:
        """Packs read by one step over all ranks and micro-batches."""
        return self.batch * self.dp * self.accumulate

    def seq_len(self, step: int) -> int:
        """Tokens of each pack of `step`."""
        return next(length for first, length in reversed(self.stages) if first <= step)

    def tokens(self, step: int) -> int:
        """Tokens read by `step` over all ranks and micro-batches."""
        return self.per_step * self.seq_len(step)

    def position(self, step: int) -> int:
        """Tokens read before `step` >= origin_step: the position in the data to save."""
        ends = [first for first, _ in self.stages[1:]] + [step]
        read = 0
        for (first, length), end in zip(self.stages, ends, strict=True):
            steps = min(end, step) - max(first, self.origin_step)
            read += max(steps, 0) * length
        return self.origin + read * self.per_step

    def starts(self, step: int) -> np.ndarray:
        """Stream position of each pack of `step`, int64 (accumulate, dp, batch)."""
        packs = np.arange(self.per_step, dtype=np.int64) * self.seq_len(step)
        return (self.position(step) + packs).reshape(self.accumulate, self.dp, self.batch)
