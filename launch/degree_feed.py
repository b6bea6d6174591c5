"""Deals a step's packs to groups of ranks of different sizes, by predicted time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.degrees import StepSchedule, degrees_of, schedule_step
from ringattn.launch.feed import LayerPlans, layer_masks
from ringattn.launch.flops import matmul_parameters
from ringattn.launch.job import Job, build_degree
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import PackedDataset
from ringattn.parallel.subgroups import run_of_ranks

_PRODUCT_SHARE = 0.6  # of the peak rate, in products with weights


@dataclass(frozen=True)
class PricedStep:
    """A step's schedule, and the plans that it was chosen by.

    Attributes:
        packs: stream positions of each pack of the schedule.
        plans: of each pack, by degree.
        schedule: its rounds name packs by their place in `packs`.
    """

    packs: list[list[int]]
    plans: dict[int, list[LayerPlans]]
    schedule: StepSchedule


@dataclass(frozen=True)
class Degrees:
    """Chooses how many ranks share each pack of a step. Host work without communication.

    Attributes:
        dataset: where packs come from.
        contexts: of this rank's group at each degree, highest first.
        shape: the model.
        world: ranks of the run. rank: this one.
    """

    dataset: PackedDataset
    contexts: dict[int, ra.ContextParallel]
    shape: ModelConfig
    world: int
    rank: int

    def deal(self, starts: np.ndarray, seq_len: int) -> list[tuple[list[int], LayerPlans]]:
        """Start and plans of this rank's pack in each round; every rank has as many rounds."""
        priced = self.price(starts, seq_len)
        dealt = []
        for entry in priced.schedule.rounds:
            pack = entry.pack_of(self.rank)
            dealt.append((priced.packs[pack], priced.plans[entry.degree][pack]))
        return dealt

    def price(self, starts: np.ndarray, seq_len: int) -> PricedStep:
        """Plans every pack of a step at every degree and schedules the step.

        All ranks plan all packs: prices are predictions and depend on nothing else.

        Args:
            starts: stream position of each pack (accumulate, dp, batch).
            seq_len: tokens of each.
        """
        packs = starts.reshape(-1, starts.shape[-1]).tolist()
        lengths = [
            [length for start in pack for length in self.dataset.lengths(start, seq_len)]
            for pack in packs
        ]
        masks = [layer_masks(of_pack, self.shape.windows) for of_pack in lengths]
        plans = {c: [cp.plans(layers) for layers in masks] for c, cp in self.contexts.items()}
        seconds = {
            degree: [self._seconds(layers, degree) for layers in of_degree]
            for degree, of_degree in plans.items()
        }
        return PricedStep(packs, plans, schedule_step(seconds, self.world))

    def _seconds(self, layers: Sequence[ra.Plan], degree: int) -> float:
        """Predicted seconds of a pack, forward and backward: attention of all layers, and the
        products with weights, which the ranks share evenly."""
        cluster = self.contexts[degree].cluster
        assert cluster is not None, "config_check asks for attention.cluster"
        tokens = layers[0].mask.seq_len / degree
        rate = 1e12 * cluster.peak_tflops * _PRODUCT_SHARE
        attention = sum(plan.seconds or 0.0 for plan in layers)
        return attention + 6 * matmul_parameters(self.shape) * tokens / rate


def open_degrees(
    job: Job, cp: ra.ContextParallel, timeout: timedelta, staged: str | None
) -> Degrees | None:
    """The groups of every degree; None without ``parallel.min_cp``. Every rank calls it together.

    Args:
        job: the run.
        cp: this rank's attention at the highest degree.
        timeout: how long a collective waits for a missing rank.
        staged: as in `ContextParallel`.
    """
    config, shape = job.config, job.shape
    if config.parallel.min_cp is None:
        return None
    contexts = {config.parallel.cp: cp}
    for degree in degrees_of(config.parallel.cp, config.parallel.min_cp)[1:]:
        group = run_of_ranks(degree, timeout)
        contexts[degree] = build_degree(config, shape, degree, group, staged)
    return Degrees(job.train, contexts, shape, config.world, dist.get_rank())


def simulated_degrees(config: Config, shape: ModelConfig, dataset: PackedDataset) -> Degrees:
    """As rank 0 of simulated ranks, to predict steps without running them."""
    found = degrees_of(config.parallel.cp, config.parallel.min_cp)
    contexts = {degree: build_degree(config, shape, degree) for degree in found}
    return Degrees(dataset, contexts, shape, config.world, 0)
