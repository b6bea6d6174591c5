"""Deals a step's packs to groups of ranks of different sizes, by predicted time."""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch.distributed as dist

import ringattn as ra
from ringattn.launch.config import Config
from ringattn.launch.degree_prices import PackPrices
from ringattn.launch.degrees import StepSchedule, degrees_of, judge_step, schedule_step
from ringattn.launch.feed import LayerPlans, layer_masks
from ringattn.launch.flops import matmul_parameters
from ringattn.launch.job import Job, build_degree
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.packing import PackedDataset
from ringattn.parallel.subgroups import run_of_ranks
from ringattn.parallel.topology import Topology
from ringattn.schedule import Lane

_CHANNELS = [(lane, long) for lane in Lane for long in (False, True)]


@dataclass(frozen=True)
class PricedStep:
    """A step's schedule and what it was chosen by.

    Attributes:
        packs: stream positions of each pack of the schedule. lengths: its documents' lengths.
        schedule: its rounds name packs by their place in `packs`.
    """

    packs: list[list[int]]
    lengths: list[list[int]]
    schedule: StepSchedule


@dataclass(frozen=True)
class Degrees:
    """Chooses how many ranks share each pack of a step. Host work without communication.

    Attributes:
        dataset: where packs come from.
        contexts: of this rank's group at each degree, highest first.
        shape: the model.
        prices: of packs, by degree.
        world: ranks of the run. rank: this one.
    """

    dataset: PackedDataset
    contexts: dict[int, ra.ContextParallel]
    shape: ModelConfig
    prices: PackPrices
    world: int
    rank: int

    def deal(self, starts: np.ndarray, seq_len: int) -> list[tuple[list[int], LayerPlans]]:
        """Start and plans of this rank's pack in each round; every rank has as many rounds.

        Only these are planned: the schedule follows from estimates.
        """
        priced = self.price(starts, seq_len)
        dealt = []
        for entry in priced.schedule.rounds:
            pack = entry.pack_of(self.rank)
            masks = layer_masks(priced.lengths[pack], self.shape.windows)
            dealt.append((priced.packs[pack], self.contexts[entry.degree].plans(masks)))
        return dealt

    def price(self, starts: np.ndarray, seq_len: int) -> PricedStep:
        """Schedules a step by what its packs are estimated to take at every degree.

        All ranks estimate all packs: predictions depend on nothing else.

        Args:
            starts: stream position of each pack (accumulate, dp, batch).
            seq_len: tokens of each.
        """
        packs = starts.reshape(-1, starts.shape[-1]).tolist()
        lengths = [
            [length for start in pack for length in self.dataset.lengths(start, seq_len)]
            for pack in packs
        ]
        tokens = starts.shape[-1] * seq_len
        products = {c: product_seconds(self.shape, x, tokens) for c, x in self.contexts.items()}
        seconds = {
            degree: [attention + products[degree] for attention in of_degree]
            for degree, of_degree in self.prices.estimated(lengths, seq_len).items()
        }
        return PricedStep(packs, lengths, schedule_step(seconds, self.world))

    def judge(self, priced: PricedStep) -> StepSchedule:
        """The schedule of a step with the seconds of plans, its own and of the plain one."""

        def seconds(pack: int, degree: int) -> float:
            lengths = priced.lengths[pack]
            products = product_seconds(self.shape, self.contexts[degree], sum(lengths))
            return self.prices.planned(lengths, degree) + products

        return judge_step(priced.schedule, seconds, max(self.contexts), self.world)


def product_seconds(shape: ModelConfig, context: ra.ContextParallel, tokens: int) -> float:
    """Predicted seconds of a pack's products with weights, forward and backward, which the ranks of
    a context with a cluster share evenly."""
    cluster = context.cluster
    assert cluster is not None, "config_check asks for attention.cluster"
    rate = 1e12 * cluster.peak_tflops * cluster.gemm_share
    return 6 * matmul_parameters(shape) * tokens / context.world / rate


def open_degrees(
    job: Job,
    cp: ra.ContextParallel,
    timeout: timedelta,
    staged: str | None,
    topology: Topology | None = None,
) -> Degrees | None:
    """The groups of every degree; None without ``parallel.min_cp``. Every rank calls it together.

    Args:
        job: the run.
        cp: this rank's attention at the highest degree.
        timeout: how long a collective waits for a missing rank.
        staged: as in `ContextParallel`.
        topology: the nodes of the job, where they are known.
    """
    config, shape = job.config, job.shape
    if config.parallel.min_cp is None:
        return None
    contexts = {config.parallel.cp: cp}
    for degree in degrees_of(config.parallel.cp, config.parallel.min_cp)[1:]:
        group = run_of_ranks(degree, timeout)
        contexts[degree] = build_degree(config, shape, degree, group, staged, topology)
    for context in contexts.values():
        # All of them here and now: groups differ in which lanes their packs use, and NCCL names a
        # group made later by how many its ranks have made before.
        context.fabric(context.device).open(_CHANNELS)
    prices = PackPrices(job.train, contexts, shape.windows)
    return Degrees(job.train, contexts, shape, prices, config.world, dist.get_rank())


def simulated_degrees(config: Config, shape: ModelConfig, dataset: PackedDataset) -> Degrees:
    """As rank 0 of simulated ranks, to predict steps without running them."""
    found = degrees_of(config.parallel.cp, config.parallel.min_cp)
    contexts = {degree: build_degree(config, shape, degree) for degree in found}
    prices = PackPrices(dataset, contexts, shape.windows)
    return Degrees(dataset, contexts, shape, prices, config.world, 0)
