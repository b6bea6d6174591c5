"""What a configuration needs and how long it takes, and how far its sequence may grow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import ringattn as ra
from ringattn.cost import Cluster
from ringattn.cost.attention_memory import scaled
from ringattn.cost.ledger import Peak
from ringattn.cost.step_memory import StepMemory, step_memory
from ringattn.cost.step_shapes import AttentionBytes, StepSettings
from ringattn.cost.step_time import AttentionSeconds, StepSeconds, model_flops, step_seconds
from ringattn.launch.config import Config
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.step_model import Device, busiest_rank, model_shape, plan_bytes, step_settings
from ringattn.planner import Quote
from ringattn.selective import cheap_part

GIB = 2**30
UNIT = 1024
"""Lengths are multiples of so many tokens per cp rank."""
LONGEST = 1 << 28
CONTEXT_GIB, WASTED = 2.0, 0.06
"""Of a device: context, libraries' workspaces and NCCL's buffers; share that the allocator's blocks
do not fill."""
WASTED_HOST = 0.10
"""Of the host's memory: the system, the loader, and rounding of page-locked blocks."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run the configuration, at its own length and at the longest that fits.

    Attributes:
        settings: how the step is run at the configured length.
        memory, seconds: predicted there.
        longest: tokens of the longest sequence that fits; 0 where none does.
    """

    settings: StepSettings
    memory: StepMemory
    seconds: StepSeconds
    longest: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The prediction for a configuration.

    Attributes:
        chosen: as configured. others: other memory settings, and how they would do.
        usable, usable_host: bytes of one rank, less what is set aside.
        tokens: of an optimizer step, all ranks. flops: of it, as MFU counts. world: ranks.
        peak_tflops: of one rank, on paper.
    """

    chosen: Option
    others: tuple[Option, ...]
    usable: float
    usable_host: float
    tokens: int
    flops: float
    world: int
    peak_tflops: float

    @property
    def fits(self) -> bool:
        """Whether the configured length fits device and host."""
        return self.holds(self.chosen.memory)

    def holds(self, memory: StepMemory) -> bool:
        """Whether a step's memory fits."""
        return memory.peak.nbytes <= self.usable and memory.host <= self.usable_host

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second and rank."""
        return self.tokens / (self.world * self.chosen.seconds.total)

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the ranks' peak would do in the time."""
        done = self.world * self.chosen.seconds.total * 1e12 * self.peak_tflops
        return self.flops / done

    @property
    def parts(self) -> Peak:
        """The peak's parts."""
        return self.chosen.memory.peak


class FitModel:
    """Predicts a configuration for any length and memory settings, from one plan.

    Bytes and messages of attention are taken from the plan at the configured length and scale with
    it; its seconds are only predicted there.

    Args:
        config: the run. shape: the model. cluster: what it runs on.
        plan: of the configured length, on simulated ranks. quote: the plan's price.
    """

    def __init__(
        self, config: Config, shape: ModelConfig, cluster: Cluster, plan: ra.Plan, quote: Quote
    ) -> None:
        self.config, self.cluster, self.plan = config, cluster, plan
        self.shape = model_shape(shape)
        self.device: Device = "cpu" if cluster.kernel == "cpu_flash" else "cuda"
        self.rank = busiest_rank(plan)
        self._attention = AttentionSeconds(
            forward=quote.priced[0].seconds, backward=quote.priced[1].seconds
        )
        self._parts: dict[tuple[str, float], tuple[AttentionBytes, float]] = {}
        self.usable = (cluster.memory_gib - CONTEXT_GIB * (self.device == "cuda")) * GIB
        self.usable *= 1 - WASTED
        self.usable_host = cluster.host_gib * GIB * (1 - WASTED_HOST)
        self.unit = UNIT * config.parallel.cp

    def settings(self, seq_len: int | None = None) -> StepSettings:
        """The configured settings, at a length."""
        at_home = int(self.plan.layout.sizes[self.rank])
        factor = (seq_len or self.config.data.seq_len) / self.config.data.seq_len
        return step_settings(self.config, round(at_home * factor), self.device)

    def memory(self, settings: StepSettings) -> StepMemory:
        """Bytes of a step; ``settings.tokens`` says at which length."""
        bytes_, _ = self._of_plan(settings)
        at_home = int(self.plan.layout.sizes[self.rank])
        return step_memory(self.shape, settings, scaled(bytes_, settings.tokens / at_home))

    def seconds(self, settings: StepSettings) -> StepSeconds:
        """Seconds of a step at the configured length."""
        _, again = self._of_plan(settings)
        kept = self.memory(settings)
        offloaded = kept.host - self.memory(replace(settings, offload_kept=False)).host
        return step_seconds(
            self.shape,
            settings,
            self.cluster,
            replace(self._attention, again=again),
            kept_bytes=offloaded,
        )

    def option(self, settings: StepSettings) -> Option:
        """The settings with their predictions."""
        return Option(
            settings=settings,
            memory=self.memory(settings),
            seconds=self.seconds(settings),
            longest=self.longest(settings),
        )

    def fits(self, settings: StepSettings) -> bool:
        """Whether a step fits device and host."""
        memory = self.memory(settings)
        return memory.peak.nbytes <= self.usable and memory.host <= self.usable_host

    def longest(self, settings: StepSettings) -> int:
        """Longest sequence that fits, a multiple of `unit` tokens; 0 where none does."""
        low, high = 0, 1

        def fits(count: int) -> bool:
            at_home = int(self.plan.layout.sizes[self.rank])
            tokens = round(at_home * count * self.unit / self.config.data.seq_len)
            return self.fits(replace(settings, tokens=tokens))

        while high * self.unit <= LONGEST and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * self.unit

    def fit(self, *, others: bool = True) -> Fit:
        """The configuration, and if wanted other ways to run it."""
        chosen = self.settings()
        config = self.config
        tokens = config.packs_per_step * config.data.seq_len
        area = float(config.packs_per_step * self.plan.mask.area)
        return Fit(
            chosen=self.option(chosen),
            others=tuple(self.option(settings) for settings in self._others(chosen) if others),
            usable=self.usable,
            usable_host=self.usable_host,
            tokens=tokens,
            flops=model_flops(self.shape, tokens, area),
            world=config.world,
            peak_tflops=self.cluster.peak_tflops,
        )

    def _others(self, chosen: StepSettings) -> Iterator[StepSettings]:
        """Every checkpointing mode with and without tiles and offloading."""
        tile = chosen.token_tile or 4 * UNIT
        for mode in ("none", "attention", "sequence", "full"):
            for used in (None, tile):
                for offload in (False, True):
                    made = replace(
                        chosen, checkpointing=mode, token_tile=used, offload_kept=offload
                    )
                    if made != chosen and not (offload and mode == "none"):
                        yield made

    def _of_plan(self, settings: StepSettings) -> tuple[AttentionBytes, float]:
        """Bytes of the plan, and the share of its forward that "sequence" computes again."""
        mode = settings.checkpointing
        key = mode if mode == "sequence" else "", settings.recompute
        if key not in self._parts:
            memory = replace(self.config.memory, checkpointing=mode)
            config = replace(self.config, memory=memory)
            again = 0.0
            if mode == "sequence":
                again = cheap_part(self.plan, settings.recompute).share
            self._parts[key] = plan_bytes(config, self.plan, self.rank, self.device), again
        return self._parts[key]
