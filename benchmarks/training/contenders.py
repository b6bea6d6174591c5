"""The contenders by name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from ringattn.benchmarks.training.case import TrainCase
from ringattn.benchmarks.training.clock import StepClock
from ringattn.benchmarks.training.ours import Ours
from ringattn.benchmarks.training.plain_torch import PlainTorch
from ringattn.benchmarks.training.ulysses import Ulysses
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.session import Session


class Contender(Protocol):
    """A way to train a model. Instances travel to the ranks by pickle."""

    @property
    def name(self) -> str:
        """Unique in a comparison."""
        ...

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Values of the configuration that are its own, by dotted key."""
        ...

    def world(self, case: TrainCase) -> int:
        """How many ranks it runs."""
        ...

    def refusal(self, case: TrainCase, shape: ModelConfig) -> str | None:
        """Why it cannot train this, or None."""
        ...

    def config(self, case: TrainCase) -> Config:
        """The configuration of its run: the data of every step are the same for all contenders."""
        ...

    def train(self, case: TrainCase, config: Config, session: Session, clock: StepClock) -> None:
        """Trains for ``clock.steps`` steps on this rank, and tells the clock after each one."""
        ...


_FULL = {"parallel.engine": "fsdp", "memory.checkpointing": "full"}
_KEPT = {"parallel.engine": "fsdp", "memory.checkpointing": "attention"}
_LONG = {**_FULL, "memory.offload": True, "memory.token_tile": 4096}

# In this order they train; the losses of the first to finish are what others are held against.
REFERENCE = "pytorch, one process"
CONTENDERS: Mapping[str, Contender] = MappingProxyType(
    {
        made.name: made
        for made in (
            PlainTorch(name=REFERENCE, sharded=False),
            PlainTorch(name="pytorch, fsdp2", sharded=True),
            Ulysses(name="deepspeed_ulysses"),
            Ours(name="ringattn", overrides={"parallel.engine": "ddp"}),
            Ours(name="ringattn, fsdp + full checkpointing", overrides=_FULL),
            Ours(name="ringattn, fsdp + attention kept", overrides=_KEPT),
            Ours(name="ringattn, fsdp + full checkpointing, offload, tiles", overrides=_LONG),
        )
    }
)


def contenders(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names, in the order of `CONTENDERS`; "all" is all of them.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name != "all" and name not in CONTENDERS:
            raise UserError(
                f"train.contenders: {name!r}",
                "is no contender",
                f"use some of all, {', '.join(map(repr, CONTENDERS))}",
            )
    return [made for name, made in CONTENDERS.items() if name in names or "all" in names]
