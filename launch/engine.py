"""Replicated data parallelism: every rank holds the whole model, gradients are summed.

An engine owns the model's parameters, gradients and optimizer; the trainer owns everything else.
Another engine (sharded parameters, say) is another class with these methods.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from ringattn.launch.config import Config
from ringattn.launch.layers import Attend
from ringattn.launch.model import Transformer, fill_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import build_optimizer, optimizer_tensors, set_learning_rate
from ringattn.launch.weights import weight_source
from ringattn.parallel.grads import GradientBuckets


class ReplicatedEngine:
    """Model, gradients and AdamW, equal on every rank of `group`.

    Args:
        config: the run; `ringattn.launch.weights` fills the weights.
        shape: the model.
        device: where parameters live.
        group: the dp × cp ranks.

    Attributes:
        model: float32 parameters; ``train.dtype=bf16`` computes under autocast.
    """

    def __init__(
        self, config: Config, shape: ModelConfig, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self.model = Transformer(shape)
        fill_weights(self.model, weight_source(config, shape))
        self.model.to(device)
        self._optimizer = build_optimizer(self.model, config.train)
        self._buckets = GradientBuckets(self.model.parameters(), group)
        self._device, self._bf16 = device, config.train.dtype == "bf16"
        self._clip_norm = config.train.clip_norm

    def loss_sum(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """Summed cross entropy of this rank's tokens, a float32 scalar.

        Every rank of the cp group calls it for the same sequence: `attend` communicates.
        """
        with self._autocast():
            return self.model(tokens_BT, positions_T, attend, labels_BT=labels_BT)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, already divided by the step's global token count."""
        loss.backward()

    def step(self, rate: float) -> torch.Tensor:
        """Sums gradients over all ranks, clips, updates, clears. Every rank calls it.

        Returns:
            The global gradient norm before clipping, a scalar tensor.
        """
        self._buckets.reduce()
        norm = self._buckets.clip(self._clip_norm)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._buckets.zero()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors a checkpoint holds, by name: views, so loading into them restores the engine.

        ``model/NAME`` are parameters and ``optimizer/NAME/STATE`` the moments. Names and shapes do
        not depend on dp or cp.
        """
        found = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        moments = optimizer_tensors(self.model, self._optimizer)
        found.update({f"optimizer/{name}": value for name, value in moments.items()})
        return found

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
