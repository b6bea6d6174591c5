"""What a model makes of long contexts: loss by position, by context length, and needles.

Each test reads its sequences in an order that does not depend on the ranks, spreads them over the
dp ranks, and sums over all ranks; the numbers depend on neither dp nor cp.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ringattn.errors import UserError
from ringattn.launch.needle_corpus import real_text
from ringattn.launch.needles import NeedleFormat, NeedleWriter
from ringattn.launch.packing import IGNORE, PackedDataset
from ringattn.launch.token_scores import Scorer
from ringattn.parallel.mesh import TrainMesh


@dataclass(frozen=True)
class Tester:
    """What every test needs.

    Attributes:
        scorer: of the model.
        mesh: sequences are spread over its dp axis.
        text: the split that real text comes from.
        device: of this rank.
    """

    scorer: Scorer
    mesh: TrainMesh
    text: PackedDataset
    device: torch.device

    def mine(self, count: int) -> Iterator[int]:
        """The sequences of this dp rank, of `count` in all."""
        return iter(range(self.mesh.dp_rank, count, self.mesh.dp))

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over all ranks, float64; every rank calls it."""
        sums = torch.from_numpy(values.astype(np.float64)).to(self.device)
        dist.all_reduce(sums, group=self.mesh.world)
        return sums.cpu().numpy()


def loss_by_position(tester: Tester, seq_len: int, packs: int) -> dict[str, Any]:
    """Mean loss by the number of earlier tokens of its document that a token's prediction sees.

    Buckets are [2^i, 2^(i+1)) tokens of context, the predicting token included. Documents are
    those of the text, cut at `seq_len`; short documents leave the far buckets empty.

    Args:
        seq_len: tokens of a sequence.
        packs: most sequences to read, spread evenly over the split.

    Returns:
        "context": first context length of each bucket, "loss": mean nats or None, "tokens".
    """
    buckets = seq_len.bit_length()
    sums = np.zeros((2, buckets))
    total = max(tester.text.tokens // seq_len, 1)
    packs = min(packs, total)
    for number in tester.mine(packs):
        pack = tester.text.read(number * total // packs * seq_len, seq_len)
        scores = tester.scorer.score(pack.tokens, pack.labels, pack.lengths)
        starts = np.repeat(np.cumsum(pack.lengths) - pack.lengths, pack.lengths)
        places = scores.places.cpu().numpy()
        context = places - starts[places] + 1
        bucket = np.floor(np.log2(context)).astype(np.int64)
        losses = scores.losses.double().cpu().numpy()
        sums[0] += np.bincount(bucket, losses, minlength=buckets)
        sums[1] += np.bincount(bucket, minlength=buckets)
    loss, tokens = tester.total(sums)
    return {
        "seq_len": seq_len,
        "context": [1 << i for i in range(buckets)],
        "loss": [s / n if n else None for s, n in zip(loss.tolist(), tokens.tolist(), strict=True)],
        "tokens": tokens.astype(int).tolist(),
    }


def loss_by_context(
    tester: Tester, lengths: Sequence[int], targets: int, samples: int
) -> dict[str, Any]:
    """Perplexity of the same tokens, predicted from more and more text before them.

    The targets are the last tokens of a window of the longest length; a context of c tokens keeps
    the last c of the window, targets included. Windows lie inside one document where enough
    documents are long enough; otherwise they run through joined documents, as "joined" says.

    Args:
        lengths: context lengths.
        targets: tokens to predict per window.
        samples: windows.

    Returns:
        "context", "loss" (mean nats), "perplexity", "tokens", "joined".

    Raises:
        UserError: a context that is not longer than the targets.
    """
    if min(lengths) <= targets:
        raise UserError(
            f"targets={targets}",
            f"must be fewer than the shortest context, {min(lengths)} tokens",
            f"use at most {min(lengths) - 1}",
        )
    longest = max(lengths)
    windows, joined = _windows(tester.text, longest, samples)
    sums = np.zeros((2, len(lengths)))
    for number in tester.mine(len(windows)):
        window = windows[number]
        for place, length in enumerate(lengths):
            tokens = window[longest - length :]
            labels = np.append(tokens[1:], IGNORE)
            labels[: length - targets - 1] = IGNORE
            scores = tester.scorer.score(tokens, labels, [length])
            sums[0, place] += float(scores.losses.double().sum())
            sums[1, place] += len(scores.losses)
    loss, tokens = tester.total(sums)
    mean = (loss / tokens).tolist()
    return {
        "context": list(lengths),
        "loss": mean,
        "perplexity": [math.exp(min(value, 700.0)) for value in mean],
        "tokens": tokens.astype(int).tolist(),
        "joined": joined,
    }


def retrieve_needles(
    tester: Tester,
    fmt: NeedleFormat,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    *,
    distractors: int,
    seed: int,
) -> dict[str, Any]:
    """Share of needles whose value the model continues exactly, by context length and depth.

    A needle counts when at every token of its value the model's likeliest token, given the true
    ones before, is the right one: the same as greedy generation gives, in one forward pass.

    Args:
        fmt: how needles read.
        lengths: tokens of the whole sequence, question and value included.
        depths: places of the needle, evenly from the beginning to right before the question.
        samples: sequences per length and depth.
        distractors: needles with other keys in each sequence.
        seed: of keys, values, distractors' places and text.

    Returns:
        "lengths", "depths", "retrieved" (lengths × depths, shares), "tokens" (likewise, share of
        value tokens), "samples".
    """
    places = [i / (depths - 1) if depths > 1 else 0.5 for i in range(depths)]
    sums = np.zeros((2, len(lengths), depths))
    cases = [(a, b, s) for a in range(len(lengths)) for b in range(depths) for s in range(samples)]
    for number in tester.mine(len(cases)):
        a, b, sample = cases[number]
        rng = np.random.Generator(np.random.PCG64([seed, lengths[a], b, sample]))
        start = int(rng.integers(tester.text.tokens))
        writer = NeedleWriter(fmt, tester.text.tokenizer, rng)
        case = writer.haystack(
            real_text(tester.text, start, lengths[a]), lengths[a], places[b], distractors
        )
        labels = np.full(lengths[a], IGNORE)
        first = lengths[a] - case.answer
        labels[first - 1 : -1] = case.tokens[first:]
        hits = tester.scorer.score(case.tokens, labels, [lengths[a]]).hits
        right = torch.tensor([float(hits.sum())], device=tester.device)
        dist.all_reduce(right, group=tester.mesh.cp_mesh.get_group())
        # Every rank of the cp group knows the sum: each adds its part.
        sums[0, a, b] += float(right == case.answer) / tester.mesh.cp
        sums[1, a, b] += float(right) / case.answer / tester.mesh.cp
    retrieved, tokens = tester.total(sums) / samples
    return {
        "lengths": list(lengths),
        "depths": places,
        "retrieved": retrieved.tolist(),
        "tokens": tokens.tolist(),
        "samples": samples,
        "distractors": distractors,
    }


def _windows(text: PackedDataset, length: int, samples: int) -> tuple[list[np.ndarray], bool]:
    """Up to `samples` stretches of real text, and whether they had to be joined."""
    starts = [start for start, size in text.documents() if size > length]
    if len(starts) >= samples:
        chosen = [starts[i * len(starts) // samples] for i in range(samples)]
        return [text.read(start, length).tokens for start in chosen], False
    step = max(text.tokens // samples, 1)
    return [real_text(text, i * step, length)[:length] for i in range(samples)], True
