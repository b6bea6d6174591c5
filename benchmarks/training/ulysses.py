"""DeepSpeed Ulysses: its `DistributedAttention` around SDPA, its ZeRO around the model."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ringattn.benchmarks.training.case import TrainCase
from ringattn.benchmarks.training.clock import StepClock
from ringattn.benchmarks.training.plain_loop import train_plainly
from ringattn.benchmarks.training.plain_model import Attention, document_attention, plain_model
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.flops import parameters
from ringattn.launch.layers import Attend
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.optimizer import bare_optimizer, set_learning_rate
from ringattn.launch.session import Session
from ringattn.parallel.zero import ZeroOptions, deepspeed_on, quiet, require_deepspeed


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    """A contender: every sequence is cut contiguously over all ranks, with full checkpointing.

    Attributes:
        name: of the contender.
        attention: of whole sequences with documents of given lengths.
        overrides: values of the configuration; ``parallel.zero_stage`` is 2 unless they say 1.
    """

    name: str
    attention: Attention = document_attention
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def world(self, case: TrainCase) -> int:
        """See `Contender.world`."""
        return case.ranks

    def refusal(self, case: TrainCase, shape: ModelConfig) -> str | None:
        """See `Contender.refusal`: needs the package, and heads and tokens that divide."""
        world, config = case.ranks, self.config(case)
        try:
            require_deepspeed()
        except UserError as error:
            return f"deepspeed is not installed: {error.fix}"
        if shape.window is not None:
            return f"model.window={shape.window}: one call per document computes no window"
        if config.parallel.zero_stage > 2:
            return f"parallel.zero_stage={config.parallel.zero_stage}: this contender runs 1 and 2"
        if config.data.seq_len % world:
            return f"{config.data.seq_len} tokens do not divide among {world} ranks"
        if shape.heads % world:
            return f"{shape.heads} query heads do not divide among {world} ranks"
        if shape.kv_heads % world and world % shape.kv_heads:
            return f"{shape.kv_heads} key heads and {world} ranks: neither divides the other"
        return None

    def config(self, case: TrainCase) -> Config:
        """See `Contender.config`."""
        own = {"parallel.cp": case.ranks, "train.accumulate": case.packs, "parallel.zero_stage": 2}
        return case.config(case.ranks, {**own, **self.overrides})

    def train(self, case: TrainCase, config: Config, session: Session, clock: StepClock) -> None:
        """See `Contender.train`."""
        model = _UlyssesStep(config, case.shape(config), session, self.attention)
        try:
            train_plainly(config, session, model, clock, clock.steps)
        finally:
            model.close()


class _UlyssesStep:
    """A `PlainStep`."""

    def __init__(
        self, config: Config, shape: ModelConfig, session: Session, attention: Attention
    ) -> None:
        self._session, self._shape, self._attention = session, shape, attention
        self._world = session.ranks.world
        options = ZeroOptions(
            stage=config.parallel.zero_stage,
            bf16=config.train.dtype == "bf16",
            offload_optimizer=False,
            offload_parameters=False,
            accumulate=config.train.accumulate,
            clip_norm=config.train.clip_norm,
            compiled=False,
        )
        group = dist.group.WORLD
        assert group is not None
        with ExitStack() as stack:
            deepspeed = stack.enter_context(deepspeed_on(session.device, group))
            with quiet():
                model = plain_model(shape, config.seed, session.device, options.dtype)
                self._adamw = bare_optimizer(model, config.train)
                settings = options.config()
                # It allocates a whole bucket, which would be most of a small model's memory.
                bucket = settings["zero_optimization"]["reduce_bucket_size"]
                settings["zero_optimization"]["reduce_bucket_size"] = min(bucket, parameters(shape))
                self._engine = deepspeed.initialize(
                    model=model,
                    optimizer=self._adamw,
                    config=settings,
                    dist_init_required=False,
                )[0]
            stack.callback(self._engine.destroy)
            self._layer = importlib.import_module("deepspeed.sequence.layer")
            self._open = stack.pop_all()

    def loss_sum(
        self, tokens: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """See `PlainStep.loss_sum`: of this rank's tokens."""
        rank, rows = self._session.ranks.rank, len(tokens) // self._world
        mine = slice(rank * rows, (rank + 1) * rows)
        device = self._session.device
        positions = torch.arange(len(tokens), device=device)[mine]
        own = [x[None, mine].to(device) for x in (tokens, labels)]
        return self._engine(own[0], positions, own[1], self._exchanging(list(lengths)))

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """See `PlainStep.backward`. DeepSpeed takes the mean over ranks of what is to be summed."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world, scale_wrt_gas=False)

    def step(self, rate: float) -> None:
        """See `PlainStep.step`."""
        set_learning_rate(self._adamw, rate)
        self._engine.step()

    def close(self) -> None:
        """See `PlainStep.close`."""
        self._open.close()

    def _exchanging(self, lengths: list[int]) -> Attend:
        """Attention of whole sequences and a share of the heads, between DeepSpeed's exchanges."""
        module = self._layer.DistributedAttention(
            self._attention(lengths), dist.group.WORLD, scatter_idx=2, gather_idx=1
        )
        repeats = max(1, self._world // self._shape.kv_heads)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if repeats > 1:  # it refuses fewer key heads than ranks
                k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
            return module(q, k, v, 0)

        return attend
