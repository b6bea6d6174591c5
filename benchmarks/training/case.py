"""What is trained, by all contenders alike, and what a rank of one tells of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ringattn.launch.config import Config
from ringattn.launch.config_check import resolve_model
from ringattn.launch.config_load import config_from_values
from ringattn.launch.corpus import load_meta
from ringattn.launch.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """A short training run. It travels to the ranks by pickle.

    Attributes:
        values: of the configuration, by dotted key; contenders add their ``parallel`` and
            ``memory``. ``train.steps`` counts warm-up and measured steps.
        ranks: that the contenders share the machine among.
        packs: sequences of one optimizer step, whoever reads them.
        warmup: steps before the measured ones.
        traced: steps that are run once more to see their memory, where allocations have to be
            traced (CPU); 0 for none.
        vocab_size: of the model, where it is more than the corpus's.
        threads: CPU threads of all ranks together.
    """

    values: Mapping[str, Any]
    ranks: int
    packs: int
    warmup: int = 0
    traced: int = 0
    vocab_size: int | None = None
    threads: int = 1

    def config(self, world: int, overrides: Mapping[str, Any]) -> Config:
        """The configuration of a contender that runs `world` ranks.

        Args:
            world: its ranks, which share `threads`.
            overrides: its own values.
        """
        shared = {"train.threads_per_rank": max(1, self.threads // world)}
        return config_from_values({**self.values, **shared, **overrides})

    def shape(self, config: Config) -> ModelConfig:
        """The model."""
        meta = load_meta(config.data.corpora[0][0])
        shape = resolve_model(config, meta.vocab_size)
        return replace(shape, vocab_size=max(shape.vocab_size, self.vocab_size or 0))


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank saw.

    Attributes:
        losses: of every step, warm-up included; equal on all ranks.
        wall_s, cpu_s: of every step: wall seconds, and CPU seconds of all threads of the process.
        peak_bytes: of tensors, in the measured steps; None where it was not looked at.
    """

    losses: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
