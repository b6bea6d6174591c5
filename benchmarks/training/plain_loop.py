"""The training loop of the peers: that of a plain script, over our packs and schedule."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ringattn.benchmarks.training.clock import StepClock
from ringattn.launch.config import Config
from ringattn.launch.data_loader import Loader
from ringattn.launch.feed import step_batches
from ringattn.launch.job import open_split
from ringattn.launch.schedule import learning_rate
from ringattn.launch.session import Session


class PlainStep(Protocol):
    """Model and optimizer of a peer; all its ranks call every method together."""

    def loss_sum(
        self, tokens: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Summed cross entropy of what this rank computes of a sequence, a float32 scalar.

        Args:
            tokens, labels: int64 (T,), the whole sequence, on the CPU.
            lengths: of its documents.
        """
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients of a loss that is already divided by the step's counted tokens."""
        ...

    def step(self, rate: float) -> None:
        """Sums gradients over ranks, clips, updates, clears."""
        ...

    def close(self) -> None:
        """Releases what is not this process's alone."""
        ...


def train_plainly(
    config: Config, session: Session, model: PlainStep, clock: StepClock, steps: int
) -> None:
    """Trains for `steps` steps. Every rank calls it.

    With ``parallel.dp`` ranks each reads packs of its own, else all read the same.
    """
    dataset, batches = open_split(config, "train"), step_batches(config, 0, 0)
    dp_rank = session.ranks.rank if config.parallel.dp > 1 else 0
    with Loader(dataset, batches, list, dp_rank=dp_rank, stop_step=steps) as loader:
        clock.begin()
        for batch in loader:
            total = torch.zeros((), dtype=torch.float64, device=session.device)
            for index, micro in enumerate(batch.micro):
                tokens, labels = torch.from_numpy(micro.tokens), torch.from_numpy(micro.labels)
                loss = model.loss_sum(tokens, labels, micro.lengths)
                last = index == len(batch.micro) - 1
                model.backward(loss / batch.valid_tokens, last=last)
                total += loss.detach()
            model.step(learning_rate(config.train, batch.step))
            dist.all_reduce(total)
            clock.tick(float(total) / batch.valid_tokens)
