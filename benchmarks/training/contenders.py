"""The contenders by name."""

from collections.abc import Callable, Mapping
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


KINDS: Mapping[str, Callable[[str, Mapping[str, Any]], Contender]] = MappingProxyType(
    {
        "ringattn": lambda name, values: Ours(name=name, overrides=values),
        "pytorch, one process": lambda name, values: PlainTorch(
            name=name, sharded=False, overrides=values
        ),
        "pytorch, fsdp2": lambda name, values: PlainTorch(
            name=name, sharded=True, overrides=values
        ),
        "deepspeed_ulysses": lambda name, values: Ulysses(name=name, overrides=values),
    }
)


def contender(name: str, overrides: Mapping[str, Any] | None = None) -> Contender:
    """The contender of a name: one of `KINDS`, alone or followed by a comma and what is special.

    Args:
        name: such as ``"ringattn, fsdp + full checkpointing"``.
        overrides: values of its configuration, by dotted key.

    Raises:
        UserError: no kind has that name.
    """
    for kind, make in KINDS.items():
        if name == kind or name.startswith(f"{kind}, "):
            return make(name, dict(overrides or {}))
    raise UserError(
        f"contenders: {name!r}",
        "is no contender",
        f"begin it with one of {', '.join(map(repr, KINDS))}",
    )
