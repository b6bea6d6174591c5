"""Plain PyTorch: SDPA and full checkpointing, in one process or under FSDP2 data parallelism."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import clip_grad_norm_

from ringattn.benchmarks.training.case import TrainCase
from ringattn.benchmarks.training.clock import StepClock
from ringattn.benchmarks.training.plain_loop import train_plainly
from ringattn.benchmarks.training.plain_model import Attention, document_attention, plain_model
from ringattn.launch.config import Config
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import build_optimizer, set_learning_rate
from ringattn.launch.session import Session
from ringattn.parallel.fsdp import shard_layers
from ringattn.parallel.mesh import build_mesh


@dataclass(frozen=True, kw_only=True)
class PlainTorch:
    """A contender: whole sequences on each rank.

    Attributes:
        name: of the contender.
        sharded: every rank reads sequences of its own, parameters, gradients and optimizer are
            sharded over them by `fully_shard`; else one process does all the work.
        attention: of a sequence with documents of given lengths.
        overrides: values of the configuration.
    """

    name: str
    sharded: bool
    attention: Attention = document_attention
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def world(self, case: TrainCase) -> int:
        """See `Contender.world`."""
        return case.ranks if self.sharded else 1

    def refusal(self, case: TrainCase, shape: ModelConfig) -> str | None:
        """See `Contender.refusal`."""
        if shape.window is not None:
            return f"model.window={shape.window}: one call per document computes no window"
        if case.packs % self.world(case):
            return f"{case.packs} sequences per step do not divide among {case.ranks} ranks"
        return None

    def config(self, case: TrainCase) -> Config:
        """See `Contender.config`."""
        world = self.world(case)
        own = {"parallel.dp": world, "train.accumulate": case.packs // world}
        return case.config(world, {**own, **self.overrides})

    def train(self, case: TrainCase, config: Config, session: Session, clock: StepClock) -> None:
        """See `Contender.train`."""
        model = _PlainTorchStep(config, case.shape(config), session, self)
        train_plainly(config, session, model, clock, clock.steps)


class _PlainTorchStep:
    """A `PlainStep`."""

    def __init__(
        self, config: Config, shape: ModelConfig, session: Session, contender: PlainTorch
    ) -> None:
        self._device, self._attention = session.device, contender.attention
        bf16 = config.train.dtype == "bf16"
        self._model = plain_model(shape, config.seed, session.device, torch.float32)
        if contender.sharded:
            mesh = build_mesh(
                session.device.type, dp=config.parallel.dp, cp=1, timeout=session.timeout
            )
            shard_layers(
                self._model,
                self._model.model.layers,
                mesh.world_mesh(),
                bf16=bf16,
                reshard=True,
                offload=False,
            )
            assert isinstance(self._model, FSDPModule)
        self._autocast = bf16 and not contender.sharded
        self._optimizer = build_optimizer(self._model, config.train)
        self._clip_norm = config.train.clip_norm

    def loss_sum(
        self, tokens: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """See `PlainStep.loss_sum`."""
        device = self._device
        positions = torch.arange(len(tokens), device=device)
        attend = self._attention(list(lengths))
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            return self._model(tokens[None].to(device), positions, labels[None].to(device), attend)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `PlainStep.backward`."""
        loss.backward()

    def step(self, rate: float) -> None:
        """See `PlainStep.step`."""
        if self._clip_norm > 0:
            clip_grad_norm_(self._model.parameters(), self._clip_norm)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """See `PlainStep.close`."""
