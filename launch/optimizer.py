"""AdamW over the model's parameters, and its state under the parameters' names."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ringattn.launch.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices only (arXiv:1711.05101).

    Norm weights and biases are not decayed. The state exists from the start, so that loading a
    checkpoint and a first step see the same tensors.
    """
    optimizer = bare_optimizer(model, train)
    add_states(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
    return optimizer


def bare_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """As `build_optimizer`, without states."""
    shapes = {p: _global_shape(p) for p in model.parameters() if p.requires_grad}
    matrices = [p for p, shape in shapes.items() if len(shape) >= 2]
    others = [p for p, shape in shapes.items() if len(shape) < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=1e-8, fused=True)


def add_states(optimizer: torch.optim.AdamW, parameters: Iterable[torch.Tensor]) -> None:
    """Gives parameters the states of AdamW before its first step, placed and sharded as they."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def optimizer_tensors(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state tensors themselves (not copies), as ``parameter name/state name``."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _global_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter; DeepSpeed leaves those it has sharded empty."""
    return getattr(parameter, "ds_shape", parameter.shape)
