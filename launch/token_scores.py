"""Per-token loss and correctness of one sequence, sharded over the cp ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import ringattn as ra
from ringattn.launch.data_loader import MicroBatch
from ringattn.launch.feed import plan_maker, take_share
from ringattn.launch.model import Transformer
from ringattn.launch.packing import IGNORE

_LOGITS = 1 << 25  # most logits that exist at once


@dataclass(frozen=True)
class Scores:
    """What one rank knows of a sequence: the counted tokens whose hidden state it owns.

    Attributes:
        places: int64 (n,), places of the predicting tokens in the sequence.
        losses: float32 (n,), nats.
        hits: bool (n,), whether the likeliest token is the label.
    """

    places: torch.Tensor
    losses: torch.Tensor
    hits: torch.Tensor


class Scorer:
    """Runs a model over whole sequences and scores the tokens asked for.

    No tensor of sequence × vocabulary exists: the head sees rows that are counted, some at a time.

    Args:
        model: the whole model on every rank.
        cp: plans attention for the group of ranks that share a sequence.
        device: of this rank.
        bf16: compute in bfloat16 over float32 weights.
    """

    def __init__(
        self, model: Transformer, cp: ra.ContextParallel, device: torch.device, *, bf16: bool
    ) -> None:
        self._model, self._cp, self._device, self._bf16 = model, cp, device, bf16

    @torch.no_grad()
    def score(self, tokens: np.ndarray, labels: np.ndarray, lengths: Sequence[int]) -> Scores:
        """Scores of this rank's counted tokens. Every rank of the cp group calls it alike.

        Args:
            tokens: int64 (S,).
            labels: int64 (S,), the next token, `packing.IGNORE` where not counted.
            lengths: documents of the sequence; attention stays inside them.
        """
        plan = plan_maker(self._cp, self._model.cfg.windows)(list(lengths))
        share = take_share(MicroBatch(tokens, labels, list(lengths), plan, [0]), self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            hidden_BTC = self._model(share.tokens_BT, share.positions_T, share.attend, hidden=True)
            rows = (share.labels_BT[0] != IGNORE).nonzero()[:, 0]
            scored = [
                self._rows(hidden_BTC[0, part], share.labels_BT[0, part])
                for part in rows.split(max(1, _LOGITS // self._model.cfg.vocab_size))
            ]
        losses, hits = zip(*scored, strict=True)
        return Scores(share.positions_T[rows], torch.cat(losses), torch.cat(hits))

    def _rows(
        self, hidden_NC: torch.Tensor, labels_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NV = self._model.lm_head(hidden_NC).float()
        losses_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
        return losses_N, logits_NV.argmax(-1) == labels_N
