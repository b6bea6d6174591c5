"""A running account of allocated bytes, and what the largest total was made of."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most bytes were allocated.

    Attributes:
        moment: when, in words.
        parts: bytes by what they hold; they sum to `nbytes`.
    """

    moment: str
    parts: dict[str, float]

    @property
    def nbytes(self) -> float:
        """All bytes of the moment."""
        return sum(self.parts.values())


@dataclass
class Ledger:
    """Bytes allocated by kind, while a program is played on it.

    Attributes:
        live: bytes now, by kind.
        moment: what is being played; peaks are named by it.
        peaks: the largest total of each moment, by name, in order of first appearance.
    """

    live: dict[str, float] = field(default_factory=dict)
    moment: str = ""
    peaks: dict[str, Peak] = field(default_factory=dict)
    _total: float = 0.0
    _largest: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, nbytes: float) -> None:
        """Allocates bytes of a kind."""
        self.live[kind] = self.live.get(kind, 0.0) + nbytes
        self._total += nbytes
        known = self._largest.get(self.moment)
        if known is None or self._total > known:
            self._largest[self.moment] = self._total
            self.peaks[self.moment] = Peak(
                moment=self.moment, parts={k: n for k, n in self.live.items() if n}
            )

    def free(self, kind: str, nbytes: float) -> None:
        """Frees bytes of a kind."""
        self.live[kind] -= nbytes
        self._total -= nbytes

    def touch(self, kind: str, nbytes: float) -> None:
        """Allocates and frees: scratch of one operation."""
        self.add(kind, nbytes)
        self.free(kind, nbytes)

    def peak(self) -> Peak:
        """The largest total of all moments; the earliest where several are equal."""
        return max(self.peaks.values(), key=lambda peak: peak.nbytes)
