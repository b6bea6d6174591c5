"""A training configuration as `ringattn.cost` takes it."""

from typing import Literal

import numpy as np

import ringattn as ra
from ringattn.cost.attention_memory import attention_bytes
from ringattn.cost.step_memory import StepMemory, step_memory
from ringattn.cost.step_shapes import AttentionBytes, ModelShape, StepSettings
from ringattn.launch.config import Config
from ringattn.launch.model_config import ModelConfig
from ringattn.selective import cheap_part

Device = Literal["cpu", "cuda"]


def model_shape(shape: ModelConfig) -> ModelShape:
    """The sizes that bytes and operations follow from."""
    return ModelShape(
        layers=shape.layers,
        dim=shape.dim,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_dim=shape.ffn_dim,
        vocab_size=shape.vocab_size,
        tied=shape.tie_embeddings,
    )


def step_settings(config: Config, tokens: int, device: Device) -> StepSettings:
    """How a configuration runs a step on a rank with so many tokens of a sequence."""
    parallel, memory = config.parallel, config.memory
    return StepSettings(
        tokens=tokens,
        ranks=config.world,
        micro_batches=config.train.accumulate,
        bf16=config.train.dtype == "bf16",
        device=device,
        engine=parallel.engine,
        zero_stage=parallel.zero_stage,
        reshard=parallel.reshard,
        offload=parallel.offload,
        checkpointing=memory.checkpointing,
        recompute=memory.recompute,
        offload_kept=memory.offload,
        token_tile=memory.token_tile,
        compiled=config.train.compile,
    )


def plan_bytes(config: Config, plan: ra.Plan, rank: int, device: Device) -> AttentionBytes:
    """What a plan's attention needs on one of the cp ranks."""
    rows = int(plan.layout.sizes[rank])
    kernel = config.attention.kernel
    if kernel == "auto":
        kernel = "cpu_flash" if device == "cpu" else "flash"
    schedules = plan.forward, plan.backward
    kept = 1.0
    if config.memory.checkpointing == "sequence":
        part = cheap_part(plan, config.memory.recompute)
        tokens = plan.layout.positions(rank)
        again = sum(int(((tokens >= a) & (tokens < b)).sum()) for a, b in part.ranges)
        kept = 1.0 - again / max(rows, 1)
    return attention_bytes(schedules, rank, rows, kernel=kernel, kept_rows=kept)


def predict_memory(
    config: Config, shape: ModelConfig, plan: ra.Plan, rank: int, device: Device
) -> StepMemory:
    """Predicted bytes of a step on one of the cp ranks."""
    settings = step_settings(config, int(plan.layout.sizes[rank]), device)
    return step_memory(model_shape(shape), settings, plan_bytes(config, plan, rank, device))


def busiest_rank(plan: ra.Plan) -> int:
    """The rank with most tokens; the first of several."""
    return int(np.argmax(plan.layout.sizes))
