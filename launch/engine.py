"""What the trainer asks of an engine: the part of a run that owns weights, gradients, optimizer.

One file per engine: `engine_replicated` (``parallel.engine=ddp``), `engine_fsdp` and
`engine_deepspeed`. All give the same losses and gradient norms, and read each other's checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ringattn.launch.config import Config
from ringattn.launch.layers import Attend
from ringattn.launch.model import Fill, Transformer
from ringattn.launch.model_config import ModelConfig
from ringattn.parallel.mesh import TrainMesh


class Engine(Protocol):
    """Model, gradients and AdamW of all ranks, which call every method but `close` together."""

    def loss_sum(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """Summed cross entropy of this rank's tokens, a float32 scalar.

        Every rank of the cp group calls it for the same sequence: `attend` communicates. Sharded
        engines communicate over all ranks, without gradients too.
        """
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`, already divided by the step's global token count.

        Args:
            loss: from `loss_sum`.
            last: no other micro-batch follows before `step`.
        """
        ...

    def step(self, rate: float) -> torch.Tensor:
        """Sums gradients over all ranks, clips, updates with the learning rate, clears.

        Without an update where the norm is not finite: weights and optimizer stay as they are.

        Returns:
            The global L2 gradient norm before clipping, a scalar tensor; the same on every rank.
        """
        ...

    def discard(self) -> None:
        """Clears gradients without an update, in place of `step`, after the last `backward`."""
        ...

    def around_waits(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Has `before` and `after` called around what a forward waits for from other ranks.

        Other than attention: that is the caller's. Called once, before the first forward.
        """
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by name: float32, plain or sharded (`DTensor`) tensors.

        ``model/NAME`` are parameters, ``optimizer/NAME/STATE`` AdamW's exp_avg, exp_avg_sq and
        step. Names and global shapes depend neither on the engine nor on dp or cp.
        """
        ...

    def load(self, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Restores a checkpoint: `fill` writes into tensors named as by `tensors`, in place."""
        ...

    def whole_model(self) -> Transformer | None:
        """The model, where this rank holds all of it; else None. No communication."""
        ...

    def close(self) -> None:
        """Releases hooks and process-wide state. No communication; may be called twice."""
        ...


def open_engine(
    config: Config,
    shape: ModelConfig,
    device: torch.device,
    mesh: TrainMesh,
    weights: Fill,
) -> Engine:
    """The engine that ``parallel.engine`` names. Every rank calls it together.

    Args:
        config: the checked run.
        shape: the model.
        device: where this rank computes.
        mesh: the ranks.
        weights: writes the first value of every parameter.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    # Each is imported when it is wanted: FSDP takes long to import, DeepSpeed longer.
    match config.parallel.engine:
        case "fsdp":
            from ringattn.launch.engine_fsdp import FsdpEngine as Chosen
        case "deepspeed":
            from ringattn.launch.engine_deepspeed import DeepSpeedEngine as Chosen
        case "ddp":
            from ringattn.launch.engine_replicated import ReplicatedEngine as Chosen
    return Chosen(config, shape, device, mesh, weights)
