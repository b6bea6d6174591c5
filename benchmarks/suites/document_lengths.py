"""Document lengths of packed sequences, drawn from a histogram file.

A file is YAML (or JSON, which is YAML) with one of three keys:

    bins: [[shortest, longest, weight], ...]          # tokens; the weight counts documents
    log_uniform: {shortest: 64, longest_share: 0.25}  # longest: that share of the sequence
    mix: {histogram: NAME, histogram_share: 0.4, shortest: 8192, longest: 30720}

Lengths are drawn one by one: a bin by weight, a uniform integer inside it, clipped to what remains
of the sequence. A mix draws documents from a histogram until they hold its share of the tokens, the
rest uniform from `shortest` to `longest`, and shuffles them. ``ringattn prepare`` writes such a
file beside a corpus; the shipped ones lie in ``configs/bench/lengths``.

Sequences shorter than `WHOLE` are drawn at that length and scaled down, so that a small test has
as many documents, of the same relative lengths, as a real pack.
"""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.errors import UserError, brief
from ringattn.launch.config_load import parse_yaml

WHOLE = 8192  # shortest sequence whose lengths are not scaled
WHOLE_MIX = 65536  # the same of a mix, whose documents are long


@dataclass(frozen=True)
class Lengths:
    """A distribution of document lengths.

    Attributes:
        name: of the file.
        bins: (shortest, longest, weight) of each bin, in tokens and documents; () for log-uniform.
        log_uniform: (shortest, longest as a share of the sequence), or None.
        mix: share of the tokens that follows the bins, and (shortest, longest) of the others; or
            None where all do.
    """

    name: str
    bins: tuple[tuple[int, int, float], ...] = ()
    log_uniform: tuple[int, float] | None = None
    mix: tuple[float, tuple[int, int]] | None = None

    def draw(self, seq_len: int, seed: int) -> tuple[int, ...]:
        """Lengths of one pack, which sum to `seq_len`; equal for equal arguments."""
        whole = max(seq_len, WHOLE if self.mix is None else WHOLE_MIX)
        rng = np.random.default_rng([seed, *self.name.encode()])
        drawn = self._mixed(rng, whole) if self.mix else self._filled(rng, whole)
        ends = np.cumsum(drawn) * seq_len // whole
        sizes = np.diff(np.concatenate([[0], ends]))
        return tuple(int(n) for n in sizes[sizes > 0])

    def _mixed(self, rng: np.random.Generator, seq_len: int) -> np.ndarray:
        assert self.mix is not None
        share, (low, high) = self.mix
        short = self._filled(rng, round(share * seq_len))
        count = -(-seq_len // low)
        rest = _clipped(rng.integers(low, high + 1, count), seq_len - int(short.sum()))
        return rng.permutation(np.concatenate([short, rest]))

    def _filled(self, rng: np.random.Generator, seq_len: int) -> np.ndarray:
        """Documents until the sequence is full, the last one cut."""
        parts: list[np.ndarray] = []
        while (rest := seq_len - sum(int(p.sum()) for p in parts)) > 0:
            parts.append(_clipped(self._lengths(rng, 256, seq_len), rest))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _lengths(self, rng: np.random.Generator, count: int, seq_len: int) -> np.ndarray:
        if self.log_uniform is not None:
            shortest, share = self.log_uniform
            longest = max(shortest, int(share * seq_len))
            return np.exp(rng.uniform(np.log(shortest), np.log(longest + 1), count)).astype(int)
        low, high, weight = (np.array(column) for column in zip(*self.bins, strict=True))
        which = rng.choice(len(weight), count, p=weight / weight.sum())
        return rng.integers(low[which], high[which] + 1)


def _clipped(lengths: np.ndarray, rest: int) -> np.ndarray:
    """The first lengths, cut where they exceed what remains."""
    ends = np.minimum(np.cumsum(lengths), rest)
    sizes = np.diff(np.concatenate([[0], ends]))
    return sizes[sizes > 0]


def shipped_lengths() -> tuple[str, ...]:
    """Names of the shipped files."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


@lru_cache(maxsize=32)
def read_lengths(name: str) -> Lengths:
    """The lengths of a shipped name or of a file, such as a corpus's ``lengths.yaml``.

    Raises:
        UserError: no such file, or one that is not of the format above.
    """
    path = Path(name)
    if path.name == name and name in shipped_lengths():
        path = _folder() / f"{name}.yaml"
    elif not path.is_file():
        raise UserError(
            f"lengths {name}",
            "is no file and no shipped one",
            f"use one of {', '.join(shipped_lengths())}, or a lengths.yaml of ringattn prepare",
        )
    return _checked(path.stem, parse_yaml(path.read_text(encoding="utf-8"), f"{path}"), f"{path}")


def _folder() -> Path:
    return Path(str(importlib.resources.files("ringattn.configs"))) / "bench" / "lengths"


def _checked(name: str, content: Any, where: str) -> Lengths:
    kinds = {"bins": _bins, "log_uniform": _log_uniform, "mix": _mix}
    if not isinstance(content, Mapping) or len(content) != 1 or not set(content) <= set(kinds):
        raise UserError(where, f"must have one of the keys {', '.join(kinds)}", "write bins: [...]")
    ((kind, value),) = content.items()
    try:
        return kinds[kind](name, value)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{where}: {kind}={brief(value)}",
            f"is not of the format ({type(error).__name__}: {error})",
            "see the shipped files in configs/bench/lengths",
        ) from None


def _bins(name: str, value: Any) -> Lengths:
    bins = tuple((int(low), int(high), float(weight)) for low, high, weight in value)
    if not bins or any(not 1 <= low <= high or weight < 0 for low, high, weight in bins):
        raise ValueError("a bin is [shortest >= 1, longest >= shortest, weight >= 0]")
    if not sum(weight for *_, weight in bins) > 0:
        raise ValueError("one weight must be positive")
    return Lengths(name, bins)


def _log_uniform(name: str, value: Any) -> Lengths:
    shortest, share = int(value["shortest"]), float(value["longest_share"])
    if len(value) != 2 or shortest < 1 or not 0 < share <= 1:
        raise ValueError("shortest >= 1 and 0 < longest_share <= 1, no other key")
    return Lengths(name, log_uniform=(shortest, share))


def _mix(name: str, value: Any) -> Lengths:
    share, low, high = (
        float(value["histogram_share"]),
        int(value["shortest"]),
        int(value["longest"]),
    )
    if len(value) != 4 or not 0 <= share < 1 or not 1 <= low <= high:
        raise ValueError("0 <= histogram_share < 1 and 1 <= shortest <= longest, no other key")
    base = read_lengths(str(value["histogram"]))
    if not base.bins:
        raise ValueError("its histogram must have bins")
    return Lengths(name, base.bins, mix=(share, (low, high)))
