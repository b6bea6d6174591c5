"""Training steps whose memory is measured and predicted."""

from collections.abc import Iterator
from typing import Any

from ringattn.benchmarks.memory_measure import StepCase

_NARROW = {
    "vocab_size": 257, "dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "ffn_dim": 384, "tie_embeddings": False,
}  # fmt: skip
_DEEP = {**_NARROW, "vocab_size": 2000, "dim": 256, "head_dim": 64, "ffn_dim": 1024, "layers": 6}
_WIDE_HEAD = {**_NARROW, "vocab_size": 16_000, "layers": 2, "tie_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {"narrow": _NARROW, "deep": _DEEP, "head": _WIDE_HEAD}

MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "none-tiles": {"memory.token_tile": 512},
    "full": {"memory.checkpointing": "full"},
    "full-tiles": {"memory.checkpointing": "full", "memory.token_tile": 512},
    "attention": {"memory.checkpointing": "attention"},
    "attention-tiles-offload": {
        "memory.checkpointing": "attention", "memory.token_tile": 512, "memory.offload": True,
    },
    "sequence": {"memory.checkpointing": "sequence"},
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"parallel.engine": "ddp"},
    "fsdp": {"parallel.engine": "fsdp"},
    "fsdp-keep": {"parallel.engine": "fsdp", "parallel.reshard": False},
    "zero1": {"parallel.engine": "deepspeed", "parallel.zero_stage": 1},
    "zero2": {"parallel.engine": "deepspeed", "parallel.zero_stage": 2},
    "zero3": {"parallel.engine": "deepspeed", "parallel.zero_stage": 3},
}


def step_case(
    engine: str,
    mode: str,
    model: str,
    *,
    dtype: str = "bf16",
    tokens: int = 4096,
    documents: int = 8,
    **values: Any,
) -> StepCase:
    """A case by names; ``values`` are configuration keys with ``__`` for the dot."""
    keys = {key.replace("__", "."): value for key, value in values.items()}
    shown = "".join(f" {key.rpartition('.')[2]}={value}" for key, value in keys.items())
    return StepCase(
        name=f"{engine} {mode} {model} {dtype} {tokens}x{documents}{shown}",
        values={"train.dtype": dtype, **ENGINES[engine], **MODES[mode], **keys},
        model=MODELS[model],
        lengths=(tokens // documents,) * documents,
    )


def all_cases() -> Iterator[StepCase]:
    """Engines, modes, dtypes, models, masks and ranks, each in several combinations."""
    for dtype in ("fp32", "bf16"):
        for mode in MODES:
            yield step_case("ddp", mode, "narrow", dtype=dtype)
            yield step_case("fsdp", mode, "narrow", dtype=dtype, parallel__cp=2)
        for engine in ENGINES:
            yield step_case(engine, "none", "deep", dtype=dtype, tokens=2048, parallel__cp=2)
            yield step_case(engine, "full", "head", dtype=dtype, tokens=2048, parallel__dp=2)
        yield step_case("ddp", "none", "head", dtype=dtype, tokens=2048)
        yield step_case("ddp", "full", "narrow", dtype=dtype, documents=1, parallel__cp=2)
    for method in ("ring", "ulysses", "direct"):
        yield step_case(
            "ddp", "full", "narrow", documents=1, parallel__cp=2, attention__method=method
        )
    yield step_case("fsdp", "full", "deep", tokens=2048, parallel__cp=2, train__accumulate=2)
