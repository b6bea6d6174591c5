"""Settings that a configuration changes in vain, because another setting leaves them no effect."""

from collections.abc import Callable, Mapping
from typing import Any

from ringattn.launch.config import Config
from ringattn.launch.config_load import config_values

_Values = Mapping[str, Any]

# key: (whether it is read, what would make it so). They are no mistakes: one file may serve several
# engines, and a switch on the command line leaves what belonged to the other one.
_READ: Mapping[str, tuple[Callable[[_Values], bool], str]] = {
    "parallel.zero_stage": (
        lambda v: v["parallel.engine"] == "deepspeed", "parallel.engine=deepspeed",
    ),
    "parallel.reshard": (lambda v: v["parallel.engine"] == "fsdp", "parallel.engine=fsdp"),
    "memory.recompute": (
        lambda v: v["memory.checkpointing"] == "sequence", "memory.checkpointing=sequence",
    ),
    "attention.refine": (lambda v: v["attention.cluster"] is not None, "attention.cluster"),
    "faults.spike_factor": (lambda v: v["faults.on_spike"] != "ignore", "faults.on_spike"),
    "faults.spike_window": (lambda v: v["faults.on_spike"] != "ignore", "faults.on_spike"),
    "faults.straggler_steps": (
        lambda v: v["faults.straggler_factor"] > 0, "faults.straggler_factor",
    ),
    "checkpoint.keep_every": (lambda v: v["checkpoint.keep"] > 0, "checkpoint.keep above 0"),
    "data.path": (lambda v: v["data.mixture"] is None, "no data.mixture"),
}  # fmt: skip


def idle_settings(config: Config) -> list[str]:
    """A line for every setting that is not its default and that nothing will read."""
    values, defaults = config_values(config), config_values(Config())
    return [
        f"{key}={values[key]} has no effect without {needed}"
        for key, (is_read, needed) in _READ.items()
        if values[key] != defaults[key] and not is_read(values)
    ]
