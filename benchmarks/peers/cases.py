"""The masks of the comparison as peers see them: a pattern with its parameters, or any mask.

Cases are sent to workers by pickle. `mask_case` makes the named ones, `case_of_mask` one of any
mask of `ringattn.masks`.
"""

from dataclasses import dataclass

import numpy as np

import ringattn as ra
from ringattn.benchmarks.calibration_rows import LENGTH_BINS, typical_packs
from ringattn.benchmarks.peers.patterns import (
    CAUSAL,
    DOCUMENTS,
    FULL,
    SHARED_QUESTION,
    TWO_SIDED_DOCUMENTS,
    WINDOW,
    is_causal,
    pattern_of,
)
from ringattn.blocks import plain_bands

_PATTERNS = {
    "causal": CAUSAL,
    "documents": DOCUMENTS,
    "short_documents": DOCUMENTS,
    "bidirectional_documents": TWO_SIDED_DOCUMENTS,
    "window": WINDOW,
    "shared_question": SHARED_QUESTION,
}
NAMES = tuple(_PATTERNS)
DENSE = ("causal",)  # masks without work that a plain causal method computes in vain
SHORT = 1024  # longest of the short documents
KEYS = 1024  # keys that a query of the window sees


@dataclass(frozen=True)
class MaskCase:
    """A mask and what a peer has to know of it.

    Attributes:
        name: unique in a comparison; one of `NAMES` where no pattern is given.
        seq_len: S.
        lengths: of documents; () without documents.
        window: keys that a query of a window sees up to itself, which is one of them.
        ahead: keys behind itself that it sees.
        pattern: one of `patterns.PATTERNS`; that of the name where not given.
        built: the mask of a case whose name is not one of `NAMES`.
    """

    name: str
    seq_len: int
    lengths: tuple[int, ...] = ()
    window: int = KEYS
    ahead: int = 0
    pattern: str = ""
    built: ra.Mask | None = None

    def __post_init__(self) -> None:
        if not self.pattern:
            object.__setattr__(self, "pattern", _PATTERNS[self.name])

    @property
    def causal(self) -> bool:
        """Whether no query attends a later key."""
        if self.built is not None:
            return is_causal(self.built)
        return self.pattern not in (FULL, TWO_SIDED_DOCUMENTS) and self.ahead == 0

    @property
    def is_packed(self) -> bool:
        """Whether the mask is a list of separate documents."""
        return self.pattern in (DOCUMENTS, TWO_SIDED_DOCUMENTS)

    def mask(self) -> ra.Mask:
        """The mask."""
        if self.built is not None:
            return self.built
        if self.pattern in (CAUSAL, FULL):
            return getattr(ra.masks, self.pattern)(self.seq_len)
        if self.pattern == WINDOW:
            return ra.masks.sliding_window(self.seq_len, self.window - 1, self.ahead)
        if self.pattern == SHARED_QUESTION:
            return ra.masks.shared_question(self.lengths)
        return ra.masks.documents(self.lengths, causal=self.causal)

    @property
    def unfit(self) -> str | None:
        """Why no peer can be handed the mask, in one line; None if one can."""
        if self.built is not None and self.built.routing is not None:
            return "its blocks are selected at run time; peers take masks that are known before"
        return None


def case_of_mask(mask: ra.Mask, name: str = "") -> MaskCase:
    """The case of any mask, under a name of its own; the pattern is read off its bands.

    Documents, windows, causal and full masks are recognised however they were built; whatever else
    has the pattern "other".
    """
    found = pattern_of(mask)
    return MaskCase(
        name or mask.name,
        mask.seq_len,
        found.lengths,
        found.before + 1,
        found.ahead,
        found.pattern,
        mask,
    )


def allowed_block(mask: ra.Mask, queries: range, keys: range, q_heads: int = 1) -> np.ndarray:
    """Bool (queries, keys): which of a run of keys each of a run of queries may attend.

    (q_heads, queries, keys) for a mask whose heads differ.
    """
    if not mask.is_uniform:
        heads = (mask.for_heads(q_heads, head, head + 1) for head in range(q_heads))
        return np.stack([allowed_block(one, queries, keys) for one in heads])
    found = np.zeros((len(queries), len(keys)), dtype=bool)
    bands, _ = plain_bands(mask)
    near = (bands["q0"] < queries.stop) & (bands["q1"] > queries.start)
    near &= (bands["k0"] < keys.stop) & (bands["k1"] > keys.start)
    for band in bands[near].tolist():
        q0, q1, k0, k1, lo, hi, step = band
        q = np.arange(_first(q0, queries.start, step), min(q1, queries.stop), step)
        k = np.arange(_first(k0, keys.start, step), min(k1, keys.stop), step)
        if q.size and k.size:
            distance = k[None, :] - q[:, None]
            part = np.ix_(q - queries.start, k - keys.start)
            found[part] |= (lo <= distance) & (distance <= hi)
    return found


def _first(start: int, low: int, step: int) -> int:
    """The least number of start, start + step, ... that is at least `low`."""
    return start + max(0, -((start - low) // step)) * step


def mask_case(name: str, seq_len: int) -> MaskCase:
    """The case of a name at a length. Documents follow the length histogram of a published
    benchmark (cut at S/4; the median pack by area); the short ones its bins up to `SHORT`.
    The shared question is the longest document. Sequences shorter than four windows get a window
    of S/4.
    """
    lengths: tuple[int, ...] = ()
    if name == "short_documents":
        lengths = _short_lengths(seq_len)
    elif name not in ("causal", "window"):
        lengths = tuple(int(n) for n in typical_packs(seq_len)[1])
        rest = seq_len - sum(lengths)  # very short packs may end early
        lengths += (rest,) * (rest > 0)
    if name == "shared_question":
        longest = lengths.index(max(lengths))
        lengths = (lengths[longest], *lengths[:longest], *lengths[longest + 1 :])
    return MaskCase(name, seq_len, lengths, min(KEYS, seq_len // 4))


def _short_lengths(seq_len: int, seed: int = 0) -> tuple[int, ...]:
    longest = min(SHORT, seq_len // 4)
    tops = np.array([0] + [top for top, _ in LENGTH_BINS if top <= longest])
    counts = np.array([count for top, count in LENGTH_BINS if top <= longest], dtype=np.float64)
    rng = np.random.default_rng(seed)
    bins = rng.choice(len(counts), size=seq_len, p=counts / counts.sum())
    drawn = rng.integers(tops[bins] + 1, tops[bins + 1] + 1)
    sizes = np.diff(np.minimum(np.concatenate([[0], np.cumsum(drawn)]), seq_len))
    return tuple(int(n) for n in sizes[sizes > 0])
