"""What rows of one kind share that the model does not say: small factors on speed, by name.

An effect is a word or several that rows have in common ("method=ring mask=causal"), with a weight;
its value times the weight is the logarithm of a factor on the row's speed, or on its memory. Values
are drawn to zero by the spreads in `configs/calibration/prior.yaml`, so that rows without known
effects get the model's own figure. What rows differ in stands in the weight, never in the spread:
an effect has one value, whoever shares it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from ringattn.benchmarks.simulator.attention import Prices, attention_of, kernel_of, partial_of
from ringattn.benchmarks.simulator.figures import Figures, defaults
from ringattn.benchmarks.simulator.mask_names import group_named, kind_named
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.tables import entry_for, same_hardware

DOCUMENTS = 2.4
"""How much more an effect weighs on rows of documents: what they share differs by more."""
START = 0.04
"""Seconds of a call on several GPUs below which what happens at its start counts in full."""
DIRECTION_SHARES = {"forward": 1 / 3.5, "backward": 2.5 / 3.5}
"""Of the time of a row that holds both: they share what rows of one direction tell."""
REPEATS = 16
"""Repetitions of a measurement that says nothing else; of fewer, the noise is larger."""
MEMORY = ("memory", "verdict", "length")
"""Kinds of figures that follow from bytes."""


def words(row: Published) -> dict[str, str]:
    """What a row has in common with others, by kind."""
    directions = "+".join(row.directions)
    hardware = same_hardware(row.hardware)
    # Rows of one source that differ in a stated switch (compiled, offloaded) are of other settings.
    switches = re.findall(
        r"compile|offload=\d|zero.?\d|optimizer offload=\d|float8", row.note.lower()
    )
    return {
        "source": row.source.split("(")[0].strip(),
        "method": row.method if row.kind == "attention" else row.family,
        "direction": directions or "step",
        "mask": kind_named(row.mask),
        "group": group_named(row.mask),
        "hardware": hardware,
        "kernel": kernel_of(row),
        "checkpointing": str(entry_for("checkpointing", row.checkpointing)["mode"]),
        "model": row.model,
        "dtype": row.dtype,
        "settings": ",".join(sorted(set(switches))),
        "ranks": str(row.cp * row.tp),
        "heads": str(row.heads),
        "place": "nodes" if row.gpus > (row.per_node or 8) else "node",
        "session": f"{row.source}|{hardware}|{row.gpus}|{row.heads}|{row.seq_len}|{row.model}",
    }


def effects_of(row: Published) -> dict[str, tuple[float, float]]:
    """The effects of a row: weight and prior standard deviation of each, by name."""
    table, own = defaults()["effects"], words(row)
    found: dict[str, tuple[float, float]] = {}
    sizes = {"attention": 1.0, "step": 1.0}
    if row.kind == "attention":
        single = row.gpus == 1
        sizes = {"attention": 1.0, "ranks": 0.0 if single else math.log2(row.gpus / 16)}
        if row.seq_len > 0 and own["group"] != "documents":
            sizes["partial"] = partial_of(row)
        if own["group"] == "dense" and not single and row.seq_len > 0:
            sizes["start"] = _start(row)
    elif row.kind in MEMORY:
        sizes = {"memory": 1.0}
    else:
        tokens = max(row.seq_len, 1) / (row.cp * row.tp)
        sizes = {
            "step": 1.0,
            "load": math.log2(tokens / 16384) / 2,
            "split": math.log2(row.cp * row.tp / 8) / 2,
            "span": math.log2(row.gpus / 16) / 2,
        }
    scale = DOCUMENTS if own["group"] == "documents" else 1.0
    for kind, weight in sizes.items():
        if not weight:
            continue
        for names, spread in table[kind].items():
            for label, share in _labels(names.split(), own, row.directions):
                found[f"{kind}: {label}"] = weight * scale * share, float(spread)
    return found


def _labels(
    names: Sequence[str], own: Mapping[str, str], directions: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """What an effect is called, with its share: one for each direction that a row holds."""
    split = "direction" in names and len(directions) > 1
    for direction, share in (DIRECTION_SHARES if split else {own["direction"]: 1.0}).items():
        mine = {**own, "direction": direction}
        yield " ".join(f"{name}={mine[name]}" for name in names), share


@lru_cache(maxsize=1)
def _data_sheets() -> Prices:
    return Prices(Figures())


def _start(row: Published) -> float:
    """Share of an attention call that its start is, at most 1, by data sheets, whatever a fit has
    found."""
    return min(1.0, START / _data_sheets().seconds(row, attention_of(row), row.directions)[0])


def noise_of(row: Published) -> float:
    """Standard deviation of what even a known row does not repeat."""
    source = entry_for("sources", f"{row.source} | {row.method}")
    times = float(source.get("noise", 1.0))
    repeats = re.search(r"(?:median|mean) of (\d+) runs?", row.note.lower())
    if repeats:  # the standard error of so few
        times *= max(1.0, math.sqrt(REPEATS / max(1, int(repeats.group(1)))))
    if row.kind == "attention" and row.seq_len > 0:  # long calls repeat, their start does not
        times = 1.0 + (times - 1.0) * _start(row)
    base = float(defaults()["effects"]["noise"]) * times
    return 2 * base if group_named(row.mask) == "documents" else base
