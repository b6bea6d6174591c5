"""The masks of the comparison, by name and parameters, so that they can be sent to workers."""

from dataclasses import dataclass

import numpy as np

import ringattn as ra
from ringattn.benchmarks.calibration_rows import LENGTH_BINS, typical_packs

NAMES = (
    "causal",
    "documents",
    "short_documents",
    "bidirectional_documents",
    "window",
    "shared_question",
)
DENSE = ("causal",)  # masks without work that a plain causal method computes in vain
SHORT = 1024  # longest of the short documents
WINDOW = 1024


@dataclass(frozen=True)
class MaskCase:
    """A mask by name: one of `NAMES`. `lengths` are those of documents; () without documents."""

    name: str
    seq_len: int
    lengths: tuple[int, ...] = ()
    window: int = WINDOW

    @property
    def causal(self) -> bool:
        """Whether no query attends a later key."""
        return self.name != "bidirectional_documents"

    @property
    def is_packed(self) -> bool:
        """Whether the mask is a list of separate documents."""
        return self.name in ("documents", "short_documents", "bidirectional_documents")

    def mask(self) -> ra.Mask:
        """Builds the mask."""
        if self.name == "causal":
            return ra.masks.causal(self.seq_len)
        if self.name == "window":
            return ra.masks.sliding_window(self.seq_len, self.window - 1, 0)
        if self.name == "shared_question":
            return ra.masks.shared_question(self.lengths)
        return ra.masks.documents(self.lengths, causal=self.causal)


def allowed_block(mask: ra.Mask, queries: range, keys: range) -> np.ndarray:
    """Bool (queries, keys): which of a run of keys each of a run of queries may attend."""
    found = np.zeros((len(queries), len(keys)), dtype=bool)
    for band in mask.bands.tolist():
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
    return MaskCase(name, seq_len, lengths, min(WINDOW, seq_len // 4))


def _short_lengths(seq_len: int, seed: int = 0) -> tuple[int, ...]:
    longest = min(SHORT, seq_len // 4)
    tops = np.array([0] + [top for top, _ in LENGTH_BINS if top <= longest])
    counts = np.array([count for top, count in LENGTH_BINS if top <= longest], dtype=np.float64)
    rng = np.random.default_rng(seed)
    bins = rng.choice(len(counts), size=seq_len, p=counts / counts.sum())
    drawn = rng.integers(tops[bins] + 1, tops[bins + 1] + 1)
    sizes = np.diff(np.minimum(np.concatenate([[0], np.cumsum(drawn)]), seq_len))
    return tuple(int(n) for n in sizes[sizes > 0])
