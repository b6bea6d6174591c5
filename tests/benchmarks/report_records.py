"""Records as the suites write them, with made-up figures: every suite, refusals and errors."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ringattn.benchmarks.record import Record
from ringattn.benchmarks.suites.mask_cases import NAMES
from ringattn.methods import METHODS

CPU = {"cpu": "Example CPU", "cores": 2, "memory_gib": 24.0, "gpu": None, "gpus": 0}
GPU = {"cpu": "Example CPU", "cores": 16, "memory_gib": 128.0, "gpu": "Example GPU", "gpus": 1}
VERSIONS = {"python": "3.12.1", "torch": "2.13.0", "cuda": None, "numpy": "2.4.6", "ringattn": "0"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIRECTIONS = {"forward": 4.0, "backward": 10.0, "both": 14.0}
PEERS = ("ringattn", "zigzag_ring", "deepspeed_ulysses", "one_process")
SCALED = ("causal", "documents_causal", "window_causal")


def record(name: str, config: Mapping[str, Any], **values: Any) -> Record:
    """A record whose case is made of its config."""
    keys = (
        "contender",
        "mask",
        "method",
        "layout",
        "ranks",
        "kernel",
        "direction",
        "pack",
        "scaling",
    )
    words = [str(config[key]) for key in (*keys, "links") if key in config]
    given = {"value": None, "unit": "TFLOP/s", "hardware": CPU, "versions": VERSIONS} | values
    return Record(name=name, case="-".join(words), commit=COMMIT, config=config, **given)


def attention(
    suite: str, cells: Sequence[Mapping[str, Any]], seed: int = 0, packs: int = 1
) -> Iterator[Record]:
    """Records of a suite of attention: every cell in three directions, some refused or failed."""
    rng = random.Random(f"{suite}{seed}")
    common = {
        "suite": suite, "seq_len": 4096, "heads": [8, 2], "head_dim": 64, "dtype": "float32",
        "batch": 1, "device": "cpu", "simulated": False, "lengths": "short",
        "command": f"ringattn bench {suite} --config long",
    }  # fmt: skip
    for cell in cells:
        trouble = rng.random()
        for pack in range(packs):
            for direction, factor in DIRECTIONS.items():
                config = common | dict(cell) | {"direction": direction, "pack": pack}
                name = f"bench.{suite}"
                if trouble < 0.05:
                    reason = f"method {cell.get('method')}: cannot shard such masks; use ring"
                    yield record(name, config, status="refused", reason=reason)
                elif trouble < 0.07:
                    yield record(name, config, status="error", reason="out of memory: 3.1 GiB")
                else:
                    yield _figure(name, config, factor, rng)


def _figure(name: str, config: Mapping[str, Any], factor: float, rng: random.Random) -> Record:
    area = rng.randint(1, 8) * 1_000_000
    ranks = config.get("ranks", 1)
    speed = 0.05 * rng.uniform(0.6, 1.0) * ranks**-0.2
    seconds = factor * area * 512 / (speed * 1e12 * ranks)
    figures = {
        "seconds": seconds, "cpu_seconds": 0.97 * seconds, "tflops": speed, "area": area,
        "peak_bytes": 3e7 * rng.uniform(0.5, 2), "wire_bytes": 2e7 * (ranks - 1) / ranks,
        "exposed_share": rng.uniform(0, 0.3) if ranks > 1 else 0.0,
    }  # fmt: skip
    for part in ("out", "lse", "dq", "dk", "dv"):
        figures[f"error_{part}"] = rng.uniform(1, 9) * 1e-7
    return record(name, config, value=speed, unit="TFLOP/s", spread=0.03 * speed, figures=figures)


def kernels(packs: int = 1) -> Iterator[Record]:
    """The suite kernels."""
    cells = [
        {"mask": mask, "kernel": kernel, "ranks": 1}
        for mask in NAMES[:14]
        for kernel in ("cpu_flash", "matmul", "reference")
    ]
    return attention("kernels", cells, packs=packs)


def methods(packs: int = 1, masks: Sequence[str] = NAMES) -> Iterator[Record]:
    """The suite methods: all masks, all methods, 1, 2 and 4 ranks."""
    cells = [
        {"mask": mask, "method": method, "layout": "zigzag", "ranks": ranks, "ranks_per_node": 2}
        for mask in masks
        for method in ("auto", *METHODS)
        for ranks in (1, 2, 4)
    ]
    return attention("methods", cells, packs=packs)


def masks(packs: int = 1) -> Iterator[Record]:
    """The suite masks: contenders side by side."""
    cells = [
        {"mask": mask, "contender": peer, "method": "auto", "ranks": ranks}
        for mask in NAMES[:14]
        for peer in PEERS
        for ranks in ((2, 4) if peer != "one_process" else (1,))
    ]
    return attention("masks", cells, packs=packs)


def train() -> Iterator[Record]:
    """The suite train: loss curves of three contenders, and one that is not installed."""
    common = {
        "suite": "train", "mask": "documents_causal", "seq_len": 8192, "ranks": 2,
        "dtype": "float32", "device": "cpu", "simulated": False, "command": "ringattn bench train",
        "model": {"layers": 2, "dim": 64},
    }  # fmt: skip
    for number, name in enumerate(("ringattn", "pytorch_fsdp2", "deepspeed_ulysses")):
        rng = random.Random(name)
        losses = [1.8 + 3.7 * math.exp(-k / 60) + rng.gauss(0, 0.03) for k in range(300)]
        config = common | {"contender": name, "method": "auto", "losses": losses}
        figures = {
            "tokens_per_second": 9000 - 1500 * number, "mfu": 0.41 - 0.06 * number,
            "loss": losses[-1], "step_seconds": 0.9 + 0.2 * number,
            "peak_bytes": 4e8 * (1 + number),
        }  # fmt: skip
        yield record(
            "bench.train", config, value=9000.0 - 1500 * number, unit="tokens/s", spread=40.0,
            figures=figures,
        )  # fmt: skip
    reason = "megatron: is not installed; pip install it"
    config = common | {"contender": "megatron"}
    yield record("bench.train", config, unit="tokens/s", status="refused", reason=reason)


def scaling() -> Iterator[Record]:
    """The suite scaling: measured on few ranks, simulated on many, links scaled."""
    for mask in SCALED:
        for number, method in enumerate(METHODS):
            for kind in ("weak", "strong"):
                for gpus in [1 << k for k in range(13)]:
                    yield from _scaled(mask, method, number, kind, gpus)


def _scaled(mask: str, method: str, number: int, kind: str, gpus: int) -> Iterator[Record]:
    simulated = gpus > 4
    seq_len = 16384 * gpus if kind == "weak" else 1 << 20
    config = {
        "suite": "scaling", "mask": mask, "method": method, "ranks": gpus, "scaling": kind,
        "seq_len": seq_len, "simulated": simulated, "links": "as they are",
        "command": "ringattn bench scaling --simulate",
    }  # fmt: skip
    if method == "ulysses" and gpus > 64:
        reason = f"method ulysses over {gpus} ranks: at most 64 heads; use usp"
        yield record("bench.scaling", config, unit="MFU", status="refused", reason=reason)
        return
    value = 0.5 * gpus ** -(0.02 + 0.012 * number + 0.02 * (kind == "strong"))
    figures = {"mfu": value, "step_seconds": 3 / value, "peak_bytes": 6e10, "tflops": 989 * value}
    yield record("bench.scaling", config, value=value, unit="MFU", figures=figures)
    if gpus == 4096 and kind == "weak":
        for links, factor in (("half the bandwidth", 0.8), ("twice the bandwidth", 1.1)):
            other = config | {"links": links}
            yield record("bench.scaling", other, value=value * factor**number, unit="MFU")


def simulated() -> Iterator[Record]:
    """The simulator beside measurements."""
    rng = random.Random(5)
    for mask in NAMES[:8]:
        for method in METHODS:
            seconds = rng.uniform(0.01, 0.2)
            ratio = rng.gauss(1, 0.08)
            config = {"suite": "simulated", "mask": mask, "method": method, "ranks": 4}
            figures = {"seconds": seconds, "predicted_seconds": seconds * ratio}
            yield record(
                "bench.simulated", config, value=ratio, unit="predicted/measured", figures=figures
            )


def all_suites(masks_of_methods: Sequence[str] = NAMES) -> list[Record]:
    """Every suite, and a record of a benchmark that is none of them."""
    suites = (kernels(), methods(masks=masks_of_methods), masks(), train(), scaling(), simulated())
    other = record("planning", {"mask": "causal", "tasks": 12}, value=2.5, unit="ms", spread=0.1)
    return [one for suite in suites for one in suite] + [other]


def write(path: Path, records: Sequence[Record]) -> Path:
    """The records as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(one.to_json() + "\n" for one in records), encoding="utf-8")
    return path
