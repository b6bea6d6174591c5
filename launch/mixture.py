"""Several streams of documents mixed by weight into one, document by document.

Each corpus keeps its own shuffled stream, epoch after epoch. A piece that begins at position s of
the stream of a corpus of weight w has the virtual time s / w; the mixture holds all pieces in the
order of their virtual times (start-time fair queueing, Goyal, Vin and Cheng 1996). So after any
number of tokens each corpus has supplied its share up to the length of one document, every corpus's
tokens come once per its own epoch, and no document is cut.

A place is found without reading from the start: the stream is tabled in rounds of equal virtual
time, and how many tokens lie before a round follows from the corpora's own tables.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.document_stream import DocumentStream

_ROUND = 1 << 20  # tokens; weights are held to the nearest millionth
_ROUNDS_KEPT = 3


@dataclass(frozen=True)
class _Round:
    first: int  # stream position of the round's first token
    source: np.ndarray  # corpus number of each piece
    start: np.ndarray  # its position in that corpus's stream
    ends: np.ndarray  # tokens of the round up to its end
    documents: np.ndarray  # (pieces + 1,), documents ended before each piece


class MixtureStream:
    """An endless stream of the documents of several streams in proportion to weights.

    Args:
        streams: of one split.
        weights: positive; a corpus supplies the share weight / sum of the tokens.

    Attributes:
        tokens: of one epoch of every stream together. An epoch of the mixture does not exist.

    Raises:
        UserError: a weight that is not positive, or too small a share.
    """

    def __init__(self, streams: Sequence[DocumentStream], weights: Sequence[float]) -> None:
        shares = np.asarray(weights, np.float64)
        if not (np.isfinite(shares).all() and (shares > 0).all()):
            raise UserError(
                f"data.mixture weights {list(weights)}", "must be positive", "leave out what is not"
            )
        quota = np.rint(shares / shares.sum() * _ROUND).astype(np.int64)
        if (quota < 1).any():
            raise UserError(
                f"data.mixture weights {list(weights)}",
                f"the smallest must be at least {1 / _ROUND:.1g} of their sum",
                "raise it, or leave that corpus out",
            )
        self._streams, self._quota = list(streams), quota.tolist()
        self.tokens = sum(stream.tokens for stream in streams)
        self._rounds: OrderedDict[int, _Round] = OrderedDict()

    def segment(self, position: int, most: int) -> tuple[np.ndarray, int]:
        """As `DocumentStream.segment`."""
        stream, place = self._source(position)
        return stream.segment(place, most)

    def recheck(self) -> None:
        """As `DocumentStream.recheck`."""
        for stream in self._streams:
            stream.recheck()

    def left(self, position: int) -> int:
        """As `DocumentStream.left`."""
        stream, place = self._source(position)
        return stream.left(place)

    def _source(self, position: int) -> tuple[DocumentStream, int]:
        """The corpus that a position reads from, and the position in its stream."""
        table = self._round_at(position)
        at = position - table.first
        place = int(np.searchsorted(table.ends, at, side="right"))
        before = int(table.ends[place - 1]) if place else 0
        return self._streams[int(table.source[place])], int(table.start[place]) + at - before

    def documents_ended(self, begin: int, end: int) -> int:
        """Documents whose last token lies in the stream's [begin, end)."""
        ended = 0
        while begin < end:
            table = self._round_at(begin)
            at = begin - table.first
            upto = min(int(table.ends[-1]), at + end - begin)
            places = np.searchsorted(table.ends, (at, upto), side="right")
            ended += int(np.diff(table.documents[places])[0])
            begin += upto - at
        return ended

    def _round_at(self, position: int) -> _Round:
        """The round that holds a position."""
        number = position // sum(self._quota)
        while number and sum(self._origins(number)) > position:
            number -= 1
        while sum(self._origins(number + 1)) <= position:
            number += 1
        if number not in self._rounds:
            self._rounds[number] = self._tabled(number)
            while len(self._rounds) > _ROUNDS_KEPT:
                self._rounds.popitem(last=False)
        return self._rounds[number]

    def _origins(self, number: int) -> list[int]:
        """Position in each corpus's stream of its first piece of a round."""
        pairs = zip(self._streams, self._quota, strict=True)
        return [stream.boundary(number * quota) for stream, quota in pairs]

    def _tabled(self, number: int) -> _Round:
        origins = self._origins(number)
        spans = zip(self._streams, origins, self._origins(number + 1), strict=True)
        parts = [stream.pieces(begin, end) for stream, begin, end in spans]
        source = np.repeat(np.arange(len(parts)), [len(part.start) for part in parts])
        start = np.concatenate([part.start for part in parts])
        quota = np.asarray(self._quota)[source]
        virtual = (start - number * quota) / quota
        order = np.lexsort((source, virtual))
        length = np.concatenate([part.length for part in parts])[order]
        ended = np.concatenate([part.ends_document for part in parts])[order]
        return _Round(
            first=sum(origins),
            source=source[order],
            start=start[order],
            ends=np.cumsum(length),
            documents=np.concatenate([[0], np.cumsum(ended)]),
        )
