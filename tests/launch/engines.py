"""Engines of a run by name, with what each may keep in host memory."""

from typing import Any

SHARDED: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel.engine": "fsdp"},
    "zero 1": {"parallel.engine": "deepspeed", "parallel.zero_stage": 1},
    "zero 2": {"parallel.engine": "deepspeed", "parallel.zero_stage": 2},
    "zero 3": {"parallel.engine": "deepspeed", "parallel.zero_stage": 3},
}
ENGINES: dict[str, dict[str, Any]] = {"ddp": {"parallel.engine": "ddp"}, **SHARDED}
OFFLOADS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": ("parameters",),
    "zero 1": ("optimizer",),
    "zero 2": ("optimizer",),
    "zero 3": ("optimizer", "parameters"),
}
