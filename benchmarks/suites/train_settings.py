"""Settings of the end-to-end comparison: the section ``train`` of a file in ``configs/bench``."""

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ringattn.benchmarks.training.case import TrainCase
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.config_load import config_values, load_config
from ringattn.parallel.host import usable_cpus

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What is trained, how long, by whom. Sequence lengths and numbers of ranks multiply.

    Attributes:
        config: the training configuration: a shipped name, or a file.
        values: what to change in it, as ``key=value``.
        vocab_size: of the model, where it is to be more than the corpus's.
        seq_len: tokens of a sequence; a step reads `packs` of them for each rank.
        ranks: that share the machine; None for all its GPUs, or two on the CPU.
        packs: sequences per optimizer step and rank.
        warm_up, steps: optimizer steps that are not measured, and that are.
        traced: steps that are run once more on the CPU, to trace their memory; 0 for none.
        contenders: names of `ringattn.benchmarks.training.contenders`, or "all".
        interleaved: contenders take turns, step by step, all of them in memory: what else the
            machine does then falls on all alike. Otherwise one follows the other.
        tolerance: largest relative difference between the losses of two contenders; None for that
            of the dtype.
        timeout_s: of a step, and of all before the first: a contender is given up after it.
    """

    config: str = "debug"
    values: tuple[str, ...] = ()
    vocab_size: int | None = None
    seq_len: tuple[int, ...] = (1024,)
    ranks: tuple[int, ...] | None = None
    packs: int = 1
    warm_up: int = 1
    steps: int = 3
    traced: int = 1
    contenders: tuple[str, ...] = ("all",)
    interleaved: bool = True
    tolerance: float | None = None
    timeout_s: float = 300.0

    def cases(self) -> list[TrainCase]:
        """What is trained, a case for each length and number of ranks.

        Raises:
            UserError: the configuration is missing or wrong, or a number is out of range.
        """
        for name in ("packs", "steps"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"train.{name}={getattr(self, name)}", "must be positive", "use 1 or more"
                )
        return [self._case(seq_len, ranks) for ranks in self._numbers() for seq_len in self.seq_len]

    def _numbers(self) -> tuple[int, ...]:
        if self.ranks is not None:
            return self.ranks
        return (torch.cuda.device_count() if torch.cuda.is_available() else 2,)

    def _case(self, seq_len: int, ranks: int) -> TrainCase:
        fixed = (
            f"data.seq_len={seq_len}",
            f"train.steps={self.warm_up + self.steps}",
            f"run.timeout_s={self.timeout_s}",
        )
        config = load_config(_find(self.config), [*self.values, *fixed])
        own = ("parallel.", "memory.", "checkpoint.", "train.threads_per_rank", "train.accumulate")
        values = {k: v for k, v in config_values(config).items() if not k.startswith(own)}
        threads = config.train.threads_per_rank or max(1, len(usable_cpus()) // ranks)
        return TrainCase(
            values=values,
            ranks=ranks,
            packs=self.packs * ranks,
            warmup=self.warm_up,
            traced=self.traced,
            vocab_size=self.vocab_size,
            threads=threads * ranks,
        )

    def tolerance_of(self, config: Config) -> float:
        """`tolerance`, or that of the dtype."""
        return TOLERANCES[config.train.dtype] if self.tolerance is None else self.tolerance


def _find(name: str) -> str | os.PathLike[str]:
    """A file, or a shipped configuration by its name."""
    shipped = Path(str(importlib.resources.files("ringattn.configs"))) / f"{name}.yaml"
    return shipped if Path(name).name == name and shipped.is_file() else name
