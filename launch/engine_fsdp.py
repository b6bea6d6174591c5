"""Parameters, gradients and AdamW sharded over all ranks by PyTorch's `fully_shard` (FSDP2)."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch.distributed.tensor import DTensor

from ringattn.launch.config import Config
from ringattn.launch.layers import Attend
from ringattn.launch.model import Fill, Transformer, fill_all
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import build_optimizer, optimizer_tensors, set_learning_rate
from ringattn.launch.parallelize import parallelize
from ringattn.parallel.fsdp import clip_shards, reshard, sharded_modules
from ringattn.parallel.gathers import hook_around_gathers
from ringattn.parallel.mesh import TrainMesh


class FsdpEngine:
    """Sharded model and AdamW: an `Engine`.

    Master weights are float32; ``train.dtype=bf16`` gathers and computes in bfloat16. The model is
    built without storage and filled shard by shard, so that no rank ever holds all of it.

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
        with torch.device("meta"):
            self._model = Transformer(shape)
        assert not list(self._model.buffers()), "only parameters are filled after this"
        parallelize(self._model, config, mesh)
        on_host = config.parallel.offload == "parameters"
        self._model.to_empty(device=torch.device("cpu") if on_host else device)
        # Kept from here on: while parameters are gathered, the model names the gathered ones.
        self._shards = cast(dict[str, DTensor], dict(self._model.named_parameters()))
        fill_all(self._shards, weights)
        self._optimizer = build_optimizer(self._model, config.train)
        self._group = mesh.world
        self._clip_norm = config.train.clip_norm

    def loss_sum(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """See `Engine.loss_sum`."""
        loss = self._model(tokens_BT, positions_T, attend, labels_BT=labels_BT)
        if not torch.is_grad_enabled():
            reshard(self._model)
        return loss

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Gradients are reduced to shards at once, to save memory."""
        loss.backward()

    def step(self, rate: float) -> torch.Tensor:
        """See `Engine.step`."""
        norm = clip_shards(self._shards.values(), self._group, self._clip_norm)
        if norm.isfinite():
            set_learning_rate(self._optimizer, rate)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def discard(self) -> None:
        """See `Engine.discard`. No communication."""
        self._optimizer.zero_grad()

    def around_waits(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """See `Engine.around_waits`: parameters are gathered before a module's forward."""
        hook_around_gathers(sharded_modules(self._model), before, after)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `Engine.tensors`: the engine's own shards. No communication."""
        found: dict[str, torch.Tensor] = {
            f"model/{name}": shard.detach() for name, shard in self._shards.items()
        }
        moments = optimizer_tensors(self._shards, self._optimizer)
        found.update({f"optimizer/{name}": value for name, value in moments.items()})
        return found

    def load(self, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """See `Engine.load`."""
        fill(self.tensors())

    def whole_model(self) -> None:
        """See `Engine.whole_model`."""

    def close(self) -> None:
        """See `Engine.close`."""
