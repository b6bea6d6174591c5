"""``ringattn bench scaling --simulate``: weak and strong scaling to thousands of GPUs, predicted.

One record per cell of `ringattn.benchmarks.scaling_study`: the value is tokens per second and GPU
of a training step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.scaling_study import Load, study
from ringattn.benchmarks.simulate_step import cluster_named, shape_named
from ringattn.benchmarks.suites.mask_cases import expanded, sampled
from ringattn.benchmarks.suites.progress import Progress
from ringattn.benchmarks.suites.settings import Settings
from ringattn.masks import Mask
from ringattn.methods import METHODS

NAME, UNIT = "bench.scaling", "tokens/s/GPU"


def run(settings: Settings, recorder: Recorder, show: Progress) -> None:
    """Predicts every cell that the recorder does not hold and records it.

    Raises:
        UserError: unknown models, clusters or masks, or counts that are none.
    """
    own = settings.simulated
    shape, cluster, counts = shape_named(own.model), cluster_named(own.cluster), own.counts()
    common = {
        "suite": "scaling", "contender": "ringattn", "model": own.model,
        "cluster": cluster.name, "heads": [shape.heads, shape.kv_heads],
        "head_dim": shape.head_dim, "dtype": "bfloat16", "batch": 1, "direction": "both",
        "engine": "fsdp", "checkpointing": "full", "device": "cuda", "simulated": True,
        "ranks_per_node": cluster.ranks_per_node, "lengths": own.lengths, "pack": 0,
    }  # fmt: skip
    wanted = [(mask, method) for mask in expanded(own.masks) for method in _methods(own.methods)]
    show.expect(len(wanted))
    for mask, method in wanted:
        prefix = f"{own.model}-{cluster.name}-{own.lengths}-{mask}-{method}"
        show(f"{mask} {method}")
        if not all(recorder.has(NAME, _case(prefix, c)) for c in _expected(counts, own.group)):
            for cell in study(
                shape, cluster, counts=counts, masks=[mask], methods=[method], group=own.group,
                load=Load(own.weak, own.strong_seq_len, own.strong_sequences),
                make=_maker(own.lengths, shape.heads),
            ):  # fmt: skip
                command = settings.command("scaling", f"--masks {mask}", f"--methods {method}")
                _record(recorder, prefix, cell, common | {"command": command})
        show.advance()


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


def _maker(lengths: str, heads: int) -> Callable[[str, int], Mask]:
    def make(name: str, seq_len: int) -> Mask:
        return sampled(name, seq_len, 0, lengths, heads).mask

    return make


def _methods(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(METHODS) if "all" in names else tuple(names)
