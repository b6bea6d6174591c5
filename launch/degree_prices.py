"""What packs take at each degree, estimated without planning every one of them.

Planning a pack at one degree weighs tens of ways to run it and takes a tenth of a second, too much
for every pack of every step at every degree. So a few packs of the corpus are planned and priced
in full, once per sequence length, and for each degree three terms are fitted to what they take: a
constant, the mask area, and how far rows reach within a shard (what ranks exchange, and how evenly
they can share). Nothing but corpus, configuration and cluster enters, so that all ranks estimate
alike, and a continued run as an undisturbed one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

import ringattn as ra
from ringattn.launch.feed import layer_masks
from ringattn.launch.packing import PackedDataset

SCANNED = 96  # packs of the corpus whose lengths are read to choose samples
SAMPLES = 12  # of them, spread evenly from the least work to the most, are priced in full
Windows = Sequence[int | None]


class PackPrices:
    """Predicted seconds of the attention of all layers, forward and backward, of packs.

    Args:
        dataset: where samples come from.
        contexts: attention by degree, with a cluster.
        windows: of the layers.

    Pure host work. Samples of a pack size are planned when the first pack of that size is priced,
    which takes seconds; every further pack takes microseconds.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        contexts: Mapping[int, ra.ContextParallel],
        windows: Windows,
    ) -> None:
        self._dataset, self._contexts, self._windows = dataset, contexts, windows
        self._fits: dict[tuple[int, int], dict[int, np.ndarray]] = {}

    def estimated(self, packs: Sequence[Sequence[int]], seq_len: int) -> dict[int, list[float]]:
        """Estimates by degree, in the order of the packs.

        Args:
            packs: document lengths of each, all of equally many tokens: whole sequences.
            seq_len: tokens of a sequence.
        """
        key = sum(packs[0]) // seq_len, seq_len
        if key not in self._fits:
            self._fits[key] = self._fit(*key)
        found: dict[int, list[float]] = {}
        for degree, weights in self._fits[key].items():
            found[degree] = [
                float(pack_terms(lengths, self._windows, degree) @ weights) for lengths in packs
            ]
        return found

    def planned(self, lengths: Sequence[int], degree: int) -> float:
        """Seconds of one pack from its plans at a degree, which are cached by the context."""
        plans = self._contexts[degree].plans(layer_masks(list(lengths), self._windows))
        priced = {plan: plan.seconds or 0.0 for plan in dict.fromkeys(plans)}
        return sum(priced[plan] for plan in plans)

    def _fit(self, batch: int, seq_len: int) -> dict[int, np.ndarray]:
        """Weights of the terms by degree."""
        samples = self._samples(batch, seq_len)
        fits: dict[int, np.ndarray] = {}
        for degree in self._contexts:
            terms = np.stack([pack_terms(s, self._windows, degree) for s in samples])
            seconds = np.array([self.planned(lengths, degree) for lengths in samples])
            fits[degree] = fit_terms(terms, seconds)
        return fits

    def _samples(self, batch: int, seq_len: int) -> list[tuple[int, ...]]:
        """Document lengths of packs from all over the corpus, sorted by work."""
        tokens = batch * seq_len
        step = max(1, self._dataset.tokens // (SCANNED * tokens)) * tokens
        found = {
            tuple(
                length
                for start in range(first, first + tokens, seq_len)
                for length in self._dataset.lengths(start, seq_len)
            )
            for first in range(0, SCANNED * step, step)
        }
        ordered = sorted(found, key=lambda lengths: (_area(lengths, self._windows), lengths))
        places = np.linspace(0, len(ordered) - 1, min(SAMPLES, len(ordered)))
        return [ordered[place] for place in np.rint(places).astype(int).tolist()]


def pack_terms(lengths: Sequence[int], windows: Windows, degree: int) -> np.ndarray:
    """What a pack's time is made of, in parts of the most that there can be, float64 (3,).

    A constant; mask area; tokens, each weighed by the tokens that it may attend within a shard.

    Args:
        lengths: of the documents. windows: of the layers. degree: ranks that share the pack.
    """
    sizes, tokens = np.array(lengths, np.float64), sum(lengths)
    shard = tokens / degree
    reach = sum(
        count * float(sizes @ np.minimum(sizes, shard if window is None else min(window, shard)))
        for window, count in Counter(windows).items()
    )
    layers = len(windows) * tokens
    return np.array(
        [1.0, 2 * _area(lengths, windows) / (layers * tokens), reach / (layers * shard)]
    )


def fit_terms(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Weights >= 0 with the least squared relative errors: an estimate never falls with work.

    Args:
        terms: (samples, n), not negative, the first 1. seconds: positive, (samples,).
    """
    relative = terms / seconds[:, None]
    ones = np.ones(len(seconds))
    best, least = np.zeros(terms.shape[1]), float("inf")
    for size in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), size)):
            weights = np.linalg.lstsq(relative[:, chosen], ones, rcond=None)[0]
            error = float(((relative[:, chosen] @ weights - 1) ** 2).sum())
            # A further term has to earn more than rounding.
            if (weights >= 0).all() and error < least * (1 - 1e-6) - 1e-12:
                best, least = np.zeros(terms.shape[1]), error
                best[chosen] = weights
    return best


def _area(lengths: Sequence[int], windows: Windows) -> float:
    """Allowed pairs of all layers."""
    sizes = np.array(lengths, np.float64)
    total = 0.0
    for window, count in Counter(windows).items():
        width = sizes if window is None else np.minimum(sizes, window)
        total += count * float((width * (sizes - width) + width * (width + 1) / 2).sum())
    return total
