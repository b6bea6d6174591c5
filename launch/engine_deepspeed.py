"""DeepSpeed ZeRO over all ranks, on this program's process group, schedule and checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ringattn.launch.config import Config
from ringattn.launch.layers import Attend
from ringattn.launch.model import Fill, Transformer
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import MOMENTS, add_states, bare_optimizer, set_learning_rate
from ringattn.launch.parallelize import parallelize
from ringattn.parallel.gathers import hook_around_gathers
from ringattn.parallel.mesh import TrainMesh
from ringattn.parallel.rows import as_sharded, empty_rows, rows_of
from ringattn.parallel.zero import (
    ZeroOptions,
    build_sharded,
    deepspeed_on,
    guard_updates,
    open_zero,
    quiet,
)
from ringattn.parallel.zero_state import ZeroState


class DeepSpeedEngine:
    """Sharded AdamW, gradients (stage 2) and parameters (stage 3): an `Engine`.

    In stage 3 no rank holds more than one layer of the model, from the start on. Checkpoints hold
    what the other engines' hold; one whole parameter exists at a time while they are made.

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
        parallel, train = config.parallel, config.train
        options = ZeroOptions(
            stage=parallel.zero_stage,
            bf16=train.dtype == "bf16",
            offload_optimizer=parallel.offload != "none",
            offload_parameters=parallel.offload == "parameters",
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            compiled=train.compile,
        )
        self._world = mesh.world.size()
        self._mesh = mesh.world_mesh("cpu")
        self._holds_model = options.stage < 3
        with ExitStack() as stack:
            deepspeed = stack.enter_context(deepspeed_on(device, mesh.world))
            with quiet():
                if options.stage == 3:
                    self._model = build_sharded(deepspeed, lambda: Transformer(shape), options)
                else:
                    self._model = _build(shape, device, options.dtype)
                parallelize(self._model, config, mesh)
                self._adamw = bare_optimizer(self._model, train)
                self._engine = open_zero(deepspeed, self._model, self._adamw, options)
            self._discarding = False
            # Some releases skip such updates themselves, others only in float16.
            guard_updates(self._adamw, self._may_update)
            stack.callback(self._engine.destroy)
            self._state = ZeroState(
                self._engine, self._adamw, add_states, stage=options.stage, rank=mesh.rank
            )
            self._parameters: dict[str, nn.Parameter] = dict(self._model.named_parameters())
            for name, parameter in self._parameters.items():
                value = torch.empty(_shape_of(parameter))
                weights(name, value)
                self._state.set(parameter, None, value.to(device))
            self._open = stack.pop_all()

    def loss_sum(
        self,
        tokens_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_T: torch.Tensor,
        attend: Attend | Sequence[Attend],
    ) -> torch.Tensor:
        """See `Engine.loss_sum`."""
        return self._engine(tokens_BT, positions_T, attend, labels_BT=labels_BT)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `Engine.backward`. Stages 2 and 3 reduce gradients at once."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over its group, where the step needs the sum; and it would
        # divide by the number of micro-batches, which the loss's divisor counts already.
        self._engine.backward(loss * self._world, scale_wrt_gas=False)

    def step(self, rate: float) -> torch.Tensor:
        """See `Engine.step`."""
        set_learning_rate(self._adamw, rate)
        self._engine.step()
        return self._norm()

    def discard(self) -> None:
        """See `Engine.discard`. Communicates as `step` does."""
        # Only its own step leaves DeepSpeed's buffers as the next backward pass needs them.
        self._discarding = True
        try:
            self._engine.step()
        finally:
            self._discarding = False

    def _norm(self) -> torch.Tensor:
        """The gradient norm; infinite where DeepSpeed says -1 for one that is not finite."""
        # The engine's own copy is not set until the step is over.
        found = self._engine.optimizer._global_grad_norm
        norm = torch.as_tensor(found, dtype=torch.float32)
        return norm if norm >= 0 else torch.full_like(norm, torch.inf)

    def _may_update(self) -> bool:
        return not self._discarding and bool(self._norm().isfinite())

    def around_waits(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """See `Engine.around_waits`: stage 3 gathers parameters before a module's forward."""
        if not self._holds_model:
            inside = {m for layer in self._model.model.layers for m in layer.modules()}
            inside -= set(self._model.model.layers)
            outside = [m for m in self._model.modules() if m not in inside]
            hook_around_gathers(outside, before, after)

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `Engine.tensors`: copies in host memory, of which each rank keeps its rows."""
        found: dict[str, torch.Tensor] = {}
        for entry, parameter, key in self._entries():
            whole = self._state.get(parameter, key)
            rows = rows_of(whole, self._mesh).to("cpu", torch.float32, copy=True)
            found[entry] = as_sharded(rows, whole.shape, self._mesh)
        found.update({f"optimizer/{name}/step": self._state.step for name in self._parameters})
        return found

    def load(self, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """See `Engine.load`."""
        shards = {
            entry: empty_rows(_shape_of(parameter), self._mesh)
            for entry, parameter, _ in self._entries()
        }
        steps = {f"optimizer/{name}/step": torch.zeros(()) for name in self._parameters}
        fill({**shards, **steps})
        for entry, parameter, key in self._entries():
            self._state.set(parameter, key, shards.pop(entry).full_tensor().to(parameter.device))
        self._state.step = next(iter(steps.values()))

    def whole_model(self) -> Transformer | None:
        """See `Engine.whole_model`."""
        return self._model if self._holds_model else None

    def close(self) -> None:
        """See `Engine.close`."""
        self._open.close()

    def _entries(self) -> Iterator[tuple[str, nn.Parameter, str | None]]:
        """Name in a checkpoint, parameter and state (None: the weight itself)."""
        for name, parameter in self._parameters.items():
            yield f"model/{name}", parameter, None
            for moment in MOMENTS:
                yield f"optimizer/{name}/{moment}", parameter, moment


def _build(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model with whatever values, at once where and as it will stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Transformer(shape)
    finally:
        torch.set_default_dtype(before)


def _shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
