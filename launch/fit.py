"""What a configuration needs and how long it takes, and how far its sequence may grow."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import ringattn as ra
from ringattn.cost import price_pair
from ringattn.cost.attention_memory import scaled
from ringattn.cost.ledger import Peak
from ringattn.cost.step_memory import StepMemory, step_memory
from ringattn.cost.step_shapes import AttentionBytes, StepSettings
from ringattn.cost.step_time import AttentionSeconds, StepSeconds, model_flops, step_seconds
from ringattn.launch.config import Config
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.step_model import Device, busiest_rank, model_shape, plan_bytes, step_settings
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
    """Predicts a configuration for any length and memory settings, from the plans of one length.

    Bytes of attention scale with the length; its seconds are only predicted at the plans' own.

    Args:
        config: the run; names its cluster. shape: the model.
        plans: of each layer, on simulated ranks.

    Attributes:
        seq_len: tokens of the plans. unit: of which lengths are multiples.
        usable, usable_host: bytes of one rank, less what is set aside.
    """

    def __init__(self, config: Config, shape: ModelConfig, plans: Sequence[ra.Plan]) -> None:
        context = plans[0].context
        assert context.cluster is not None, "predictions need a cluster"
        self.config, self.cluster = config, context.cluster
        self.shape = model_shape(shape)
        self.counts = Counter(plans)
        self.device: Device = "cpu" if self.cluster.kernel == "cpu_flash" else "cuda"
        self.rank = busiest_rank(plans[0])
        self.seq_len = plans[0].mask.seq_len
        self._at_home = int(plans[0].layout.sizes[self.rank])
        self.area = sum(n * plan.mask.area for plan, n in self.counts.items()) / len(plans)
        self._seconds = {
            plan: price_pair((plan.forward, plan.backward), self.cluster, context.priced_kernel)
            for plan in self.counts
        }
        self._parts: dict[tuple[str, float], tuple[AttentionBytes, float]] = {}
        self.usable = (self.cluster.memory_gib - CONTEXT_GIB * (self.device == "cuda")) * GIB
        self.usable *= 1 - WASTED
        self.usable_host = self.cluster.host_gib * GIB * (1 - WASTED_HOST)
        self.unit = UNIT * config.parallel.cp

    @property
    def methods(self) -> str:
        """How the layers attend: method, settings and layout."""
        return " and ".join(dict.fromkeys(_method_of(plan) for plan in self.counts))

    def settings(self, seq_len: int | None = None) -> StepSettings:
        """The configured settings, at a length."""
        factor = (seq_len or self.seq_len) / self.seq_len
        return step_settings(self.config, round(self._at_home * factor), self.device)

    def memory(self, settings: StepSettings) -> StepMemory:
        """Bytes of a step; ``settings.tokens`` says at which length."""
        bytes_, _ = self._of_plans(settings)
        return step_memory(self.shape, settings, scaled(bytes_, settings.tokens / self._at_home))

    def seconds(self, settings: StepSettings) -> StepSeconds:
        """Seconds of a step at the plans' length."""
        _, again = self._of_plans(settings)
        offloaded = self.memory(settings).host
        offloaded -= self.memory(replace(settings, offload_kept=False)).host
        both = [
            sum(n * self._seconds[plan][way].seconds for plan, n in self.counts.items())
            / self.shape.layers
            for way in (0, 1)
        ]
        attention = AttentionSeconds(forward=both[0], backward=both[1], again=again)
        return step_seconds(self.shape, settings, self.cluster, attention, kept_bytes=offloaded)

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
            tokens = round(self._at_home * count * self.unit / self.seq_len)
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
        tokens = config.packs_per_step * self.seq_len
        area = config.packs_per_step * self.area
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

    def _of_plans(self, settings: StepSettings) -> tuple[AttentionBytes, float]:
        """Bytes that any layer needs, and the share of the forwards that "sequence" repeats."""
        mode = settings.checkpointing
        key = mode if mode == "sequence" else "", settings.recompute
        if key not in self._parts:
            memory = replace(self.config.memory, checkpointing=mode)
            config = replace(self.config, memory=memory)
            found = [plan_bytes(config, plan, self.rank, self.device) for plan in self.counts]
            largest = {
                field.name: max(getattr(bytes_, field.name) for bytes_ in found)
                for field in fields(AttentionBytes)
            }
            again = 0.0
            if mode == "sequence":
                shares = {plan: cheap_part(plan, settings.recompute).share for plan in self.counts}
                spent = [n * shares[p] * self._forward(p) for p, n in self.counts.items()]
                whole = [n * self._forward(p) for p, n in self.counts.items()]
                again = sum(spent) / max(sum(whole), 1e-30)
            self._parts[key] = AttentionBytes(**largest), again
        return self._parts[key]

    def _forward(self, plan: ra.Plan) -> float:
        return self._seconds[plan][0].seconds


def _method_of(plan: ra.Plan) -> str:
    options = plan.settings.options or {}
    shown = "".join(f", {name}={value}" for name, value in options.items())
    return f"{plan.method}{shown} over {plan.layout.name}"
