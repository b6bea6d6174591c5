"""``ringattn bench scaling --simulate``: weak and strong scaling to thousands of GPUs, predicted.

One record per cell of `ringattn.benchmarks.scaling_study`: the value is tokens per second and GPU
of a training step. Settings are those of `configs/bench/scaling.yaml`.
"""

import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.scaling_study import Load, doubled, study
from ringattn.benchmarks.simulate_step import LARGEST_GROUP, cluster_named, shape_named
from ringattn.benchmarks.suites.mask_cases import sampled
from ringattn.benchmarks.suites.settings import ScalingSettings, Settings
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.methods import METHODS

NAME, UNIT = "bench.scaling", "tokens/s/GPU"


def run(
    settings: Settings | Mapping[str, Any], recorder: Recorder, show: Callable[[str], object]
) -> None:
    """Predicts every cell that the recorder does not hold and records it.

    Args:
        settings: those of all suites, whose own masks and methods count where they were given;
            or a mapping with keys of `configs/bench/scaling.yaml`, which stand for what is missing.
        recorder: gets records. show: is called with each mask and method.

    Raises:
        UserError: unknown keys, models, clusters, masks, or counts that are none.
    """
    given = settings if isinstance(settings, Mapping) else _chosen(settings)
    values = _defaults()
    unknown = sorted(set(given) - set(values))
    if unknown:
        raise UserError(f"key {unknown[0]!r}", f"is none of {', '.join(values)}", "remove it")
    values |= given
    shape, cluster = shape_named(str(values["model"])), cluster_named(str(values["cluster"]))
    counts = doubled(*_pair(values["gpus"]))
    group = int(values.get("group", LARGEST_GROUP))
    strong = values["strong"]
    load = Load(int(values["weak"]), int(strong["seq_len"]), int(strong["sequences"]))
    command = "" if isinstance(settings, Mapping) else settings.command("scaling", "--simulate")
    common = {
        "suite": "scaling", "contender": "ringattn", "model": values["model"],
        "cluster": values["cluster"], "heads": [shape.heads, shape.kv_heads],
        "head_dim": shape.head_dim, "dtype": "bfloat16", "batch": 1, "direction": "both",
        "engine": "fsdp", "checkpointing": "full", "device": "cuda", "simulated": True,
        "ranks_per_node": cluster.ranks_per_node, "lengths": values["lengths"], "pack": 0,
        "command": command,
    }  # fmt: skip
    make = _maker(str(values["lengths"]), shape.heads)
    for mask in values["masks"]:
        for method in _methods(values["methods"]):
            prefix = f"{values['model']}-{values['cluster']}-{values['lengths']}-{mask}-{method}"
            show(f"{mask} {method}")
            if all(recorder.has(NAME, _case(prefix, cell)) for cell in _expected(counts, group)):
                continue
            for cell in study(
                shape, cluster, counts=counts, masks=[mask], methods=[method], group=group,
                load=load, make=make,
            ):  # fmt: skip
                _record(recorder, prefix, cell, common)


def _record(
    recorder: Recorder, prefix: str, cell: Mapping[str, Any], common: Mapping[str, Any]
) -> None:
    """Writes one cell that is not there yet."""
    case = _case(prefix, cell)
    if recorder.has(NAME, case):
        return
    config = dict(common) | {
        "kind": cell["kind"], "mask": cell["mask"], "method": cell["method"], "cp": cell["cp"],
        "ranks": cell["gpus"], "seq_len": cell["seq_len"], "links": cell["links"],
        "layout": cell.get("layout", ""),
    }  # fmt: skip
    if cell["status"] != "ok":
        recorder.refused(NAME, case, UNIT, cell["reason"], config)
        return
    config["fits"] = cell["fits"]
    speed = cell["tokens_per_s_per_gpu"]
    figures = {
        "step_seconds": cell["step_s"], "tokens_per_second": speed * cell["gpus"],
        "tflops": cell["tflops_per_gpu"], "mfu": cell["mfu"],
        "peak_bytes": cell["peak_gib"] * 2**30, "wire_bytes": cell["received"],
    }  # fmt: skip
    recorder.ok(NAME, case, speed, UNIT, config=config, figures=figures)


def _case(prefix: str, cell: Mapping[str, Any]) -> str:
    return f"{prefix}-{cell['kind']}-{cell['gpus']}-cp{cell['cp']}-{cell['links']}"


def _expected(counts: Sequence[int], group: int) -> list[dict[str, Any]]:
    """The cells that any method has, refused or not."""
    return [
        {"kind": kind, "gpus": gpus, "cp": min(gpus, group), "links": "as they are"}
        for kind in ("weak", "strong")
        for gpus in counts
    ]


def _chosen(settings: Settings) -> dict[str, Any]:
    """Masks and methods that were asked for, of the settings of all suites."""
    own, usual = settings.scaling, ScalingSettings()
    chosen = {"masks": list(own.masks), "methods": list(own.methods)}
    return {key: value for key, value in chosen.items() if tuple(value) != getattr(usual, key)}


def _defaults() -> dict[str, Any]:
    source = importlib.resources.files("ringattn.configs") / "bench" / "scaling.yaml"
    return dict(yaml.safe_load(source.read_text(encoding="utf-8")))


def _maker(lengths: str, heads: int) -> Callable[[str, int], Mask]:
    def make(name: str, seq_len: int) -> Mask:
        return sampled(name, seq_len, 0, lengths, heads).mask

    return make


def _methods(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(METHODS) if "all" in names else tuple(names)


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"gpus={value!r}", "must be the smallest and the largest", "e.g. [8, 4096]")
    return int(value[0]), int(value[1])
