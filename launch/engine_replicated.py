"""Replicated data parallelism: every rank holds the whole model, gradients are summed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from ringattn.launch.config import Config
from ringattn.launch.layers import Attend
from ringattn.launch.model import Fill, Transformer, fill_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import build_optimizer, optimizer_tensors, set_learning_rate
from ringattn.launch.parallelize import parallelize
from ringattn.parallel.grads import GradientBuckets
from ringattn.parallel.mesh import TrainMesh


class ReplicatedEngine:
    """Model, gradients and AdamW, equal on every rank: an `Engine`.

    Parameters are float32; ``train.dtype=bf16`` computes under autocast.

    Args:
        config, shape, device, mesh, weights: as in `ringattn.launch.engine.open_engine`.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelConfig,
        device: torch.device,
        mesh: TrainMesh,
        weights: Fill,
    ) -> None:
        self._model = Transformer(shape)
        fill_weights(self._model, weights)
        self._model.to(device)
        parallelize(self._model, config, mesh)
        self._optimizer = build_optimizer(self._model, config.train)
        self._buckets = GradientBuckets(self._model.parameters(), mesh.world)
        self._device, self._bf16 = device, config.train.dtype == "bf16"
        self._clip_norm = config.train.clip_norm

    def loss_sum(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """See `Engine.loss_sum`."""
        with self._autocast():
            return self._model(tokens_BT, positions_T, attend, labels_BT=labels_BT)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. No communication but what attention does."""
        loss.backward()

    def step(self, rate: float) -> torch.Tensor:
        """See `Engine.step`."""
        self._buckets.reduce()
        norm = self._buckets.clip(self._clip_norm)
        if norm.isfinite():
            set_learning_rate(self._optimizer, rate)
            self._optimizer.step()
        self._buckets.zero()
        return norm

    def discard(self) -> None:
        """See `Engine.discard`. No communication."""
        self._buckets.zero()

    def around_waits(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """See `Engine.around_waits`: there is nothing to wait for."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `Engine.tensors`: the engine's own tensors. No communication."""
        parameters = dict(self._model.named_parameters())
        found = {f"model/{name}": p.detach() for name, p in parameters.items()}
        moments = optimizer_tensors(parameters, self._optimizer)
        found.update({f"optimizer/{name}": value for name, value in moments.items()})
        return found

    def load(self, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """See `Engine.load`."""
        fill(self.tensors())

    def whole_model(self) -> Transformer:
        """See `Engine.whole_model`."""
        return self._model

    def close(self) -> None:
        """See `Engine.close`."""

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
