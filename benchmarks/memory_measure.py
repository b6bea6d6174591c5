"""Measures one rank's training step at the allocator, and predicts it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.benchmarks.memory_trace import MemoryTrace
from ringattn.cost.ledger import Peak
from ringattn.launch.config_load import config_from_values
from ringattn.launch.engine import open_engine
from ringattn.launch.feed import PlanAttend
from ringattn.launch.job import build_context
from ringattn.launch.model_config import ModelConfig, model_config
from ringattn.launch.step_model import predict_memory
from ringattn.launch.weights import weight_source
from ringattn.parallel.mesh import build_mesh
from ringattn.selective import cheap_part

STEPS = 2
"""The last one is measured: before it, optimizer states and buffers may not be there yet."""


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A training step.

    Attributes:
        name: for people.
        values: of the configuration, by dotted key; ``model`` keys have no effect.
        model: fields of `ModelConfig` over those of the size "debug".
        lengths: documents of the sequence.
    """

    name: str
    values: dict[str, Any]
    model: dict[str, Any]
    lengths: tuple[int, ...]

    @property
    def shape(self) -> ModelConfig:
        """The model."""
        return model_config("debug", **self.model)

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence."""
        return sum(self.lengths)

    @property
    def world(self) -> int:
        """Ranks."""
        return self.values.get("parallel.cp", 1) * self.values.get("parallel.dp", 1)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's step.

    Attributes:
        measured: peak bytes, by part of the step and as a whole ("step").
        predicted: the model's moments. peak: its largest.
    """

    measured: dict[str, int]
    predicted: tuple[Peak, ...]
    peak: Peak

    @property
    def error(self) -> float:
        """Predicted over measured peak, less 1."""
        return self.peak.nbytes / self.measured["step"] - 1


def measure_step(rank: int, world: int, _group: Any, case: StepCase) -> Measured:
    """Runs the case's steps on this rank of the default process group; every rank calls it."""
    device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else _CPU
    return _measure(case, device)[0]


def explain_step(case: StepCase) -> tuple[Measured, MemoryTrace]:
    """As `measure_step` on a group of this process alone, with the trace itself."""
    device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else _CPU
    return _measure(case, device)


_CPU = torch.device("cpu")


def _on_cuda() -> bool:
    return dist.get_backend() != "gloo"


def _measure(case: StepCase, device: torch.device) -> tuple[Measured, MemoryTrace]:
    seq_len = case.seq_len
    config = config_from_values({**case.values, "data.seq_len": seq_len})
    shape, timeout = case.shape, timedelta(seconds=120)
    mesh = build_mesh(device.type, dp=config.parallel.dp, cp=config.parallel.cp, timeout=timeout)
    kept: list[ra.Plan] = []

    def body(part: Any) -> None:
        engine = open_engine(config, shape, device, mesh, weight_source(config, shape))
        try:
            context = build_context(config, shape, mesh.cp_mesh)
            plan = context.plan(ra.masks.documents(list(case.lengths), causal=True))
            kept.append(plan)
            if config.memory.recomputed is not None:
                cheap_part(plan, config.memory.recomputed)
            for number in range(STEPS):
                _step(engine, plan, shape, device, config.train.accumulate, part, number)
        finally:
            engine.close()

    trace = MemoryTrace(device).run(body)
    (plan,) = kept
    kind = "cuda" if device.type == "cuda" else "cpu"
    found = predict_memory(config, shape, plan, mesh.cp_rank, kind)
    measured = Measured(measured=dict(trace.peaks), predicted=found.moments, peak=found.peak)
    return measured, trace


def _step(
    engine: Any,
    plan: ra.Plan,
    shape: ModelConfig,
    device: torch.device,
    micro_batches: int,
    part: Any,
    number: int,
) -> None:
    """One optimizer step; of the last, the parts are named."""
    rows, last = int(plan.layout.sizes[plan.context.rank]), number == STEPS - 1
    generator = torch.Generator().manual_seed(number)

    def named(name: str) -> Any:
        return part(name if last else f"first {name}")

    def draw() -> torch.Tensor:
        drawn = torch.randint(0, shape.vocab_size, (1, rows), generator=generator)
        return drawn.to(device)

    with named("step"):
        for index in range(micro_batches):
            with named("forward"):
                loss = engine.loss_sum(draw(), draw(), plan.positions(), PlanAttend(plan))
            with named("backward"):
                done = index == micro_batches - 1
                engine.backward(loss / plan.mask.seq_len, last=done)
            del loss
        with named("update"):
            engine.step(1e-3)
