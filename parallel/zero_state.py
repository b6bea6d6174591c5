"""Master weights and AdamW moments of a DeepSpeed ZeRO engine, parameter by parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ZeroState:
    """Reads and writes what DeepSpeed has sharded, one whole float32 parameter at a time.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` of ZeRO stage 1, 2 or 3.
        adamw: the optimizer that it was given; `add_states` gives its parameters their states.
        add_states: called once, so that the states exist before the first step.
        stage: of ZeRO.
        rank: of this process among all.
    """

    def __init__(
        self,
        engine: Any,
        adamw: torch.optim.AdamW,
        add_states: Callable[[torch.optim.AdamW, list[torch.Tensor]], None],
        *,
        stage: int,
        rank: int,
    ) -> None:
        self._adamw, self._sharded, self._rank = adamw, stage == 3, rank
        zero = engine.optimizer
        flat = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
        # Stage 1 of bfloat16 over float32 gradients is an optimizer class of its own.
        self._flat: list[torch.Tensor] = (
            getattr(zero, flat, None) or zero.fp32_groups_flat_partition
        )
        add_states(adamw, self._flat)
        # DeepSpeed looks for states only after the first step.
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def step(self) -> torch.Tensor:
        """Updates done, a float32 scalar."""
        return self._adamw.state[self._flat[0]]["step"].detach().to("cpu", copy=True)

    @step.setter
    def step(self, value: torch.Tensor) -> None:
        for flat in self._flat:
            self._adamw.state[flat]["step"].copy_(value)

    def get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        """The whole master weight (None) or moment `key` of a parameter; every rank calls it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is None:
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, key)
        assert whole is not None, "every parameter is trained"
        return whole

    @torch.no_grad()
    def set(self, parameter: Any, key: str | None, whole: torch.Tensor) -> None:
        """Writes a whole master weight (None), and the weight computed with; or a moment.

        No communication: every rank gives the same tensor and keeps its part.
        """
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._sharded:
            part = self._part_of(whole, parameter)
            if key is None:
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.copy_(part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, whole)
            parameter.copy_(whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, key)

    def _part_of(self, whole: torch.Tensor, parameter: Any) -> torch.Tensor:
        """This rank's part of the flattened parameter; past the end, zeros."""
        size = parameter.ds_tensor.numel()
        values = whole.flatten()[self._rank * size : (self._rank + 1) * size]
        return torch.cat([values, values.new_zeros(size - values.numel())])
