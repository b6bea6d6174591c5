"""What variable context-parallel degrees save, and what choosing them costs.

    python -m ringattn.benchmarks.degree_gain [--out FILE] [--seq-len N] [--packs 16] [--kinds K]

Predicted on the H100 cluster for steps of the 8b model, of one data-parallel rank: packs of short
documents, of lengths of every scale, and of one long document in four packs. For each step and set
of degrees: the gain over packs that all run at the highest degree, by the schedule that training
chooses from estimates and by the one that plans of every pack at every degree would lead to, both
with the seconds of plans; and the CPU seconds that either takes to choose.
"""

import argparse
import time
from typing import cast

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.record import Recorder
from ringattn.launch.degree_feed import product_seconds
from ringattn.launch.degree_prices import PackPrices
from ringattn.launch.degrees import degrees_of, judge_step, schedule_step
from ringattn.launch.model_config import model_config
from ringattn.launch.packing import PackedDataset

NAME = "degree_gain"
KINDS = ("short", "log_uniform", "one_long")
WORLDS, LEAST = (8, 16, 32), (1, 4)


class Lengths:
    """Packs of drawn lengths: what `PackPrices` reads of a `PackedDataset`."""

    def __init__(self, packs: list[list[int]]) -> None:
        self.packs, self.tokens = packs, sum(map(sum, packs))

    def lengths(self, start: int, seq_len: int) -> list[int]:
        """As `PackedDataset.lengths`, of whole packs."""
        return self.packs[start // seq_len % len(self.packs)]


def draw_packs(kind: str, seq_len: int, count: int, seed: int) -> list[list[int]]:
    """Document lengths of packs: log-normal around 1,000 tokens ("short"), log-uniform from 64 to
    `seq_len`, or short ones but for every fourth pack, which is one document ("one_long")."""
    rng = np.random.default_rng(seed)
    packs: list[list[int]] = []
    for index in range(count):
        lengths: list[int] = []
        while (left := seq_len - sum(lengths)) > 0:
            if kind == "one_long" and index % 4 == 0:
                size = seq_len
            elif kind == "log_uniform":
                size = int(np.exp(rng.uniform(np.log(64), np.log(seq_len))))
            else:
                size = int(rng.lognormal(np.log(1000), 1))
            lengths.append(min(left, max(size, 1)))
        packs.append(lengths)
    return packs


def measure(recorder: Recorder, kind: str, seq_len: int, count: int) -> None:
    """Records a kind of packs at one length."""
    shape = model_config("8b")
    contexts = {
        degree: ra.ContextParallel(
            degree,
            heads=(shape.heads, shape.kv_heads),
            head_dim=shape.head_dim,
            dtype=torch.bfloat16,
            method="auto" if degree > 1 else "ring",
            layout="auto" if degree > 1 else "contiguous",
            cluster="h100_sxm",
        )
        for degree in degrees_of(max(WORLDS), 1)
    }
    packs = draw_packs(kind, seq_len, 6 * count, seed=seq_len)
    step, windows = packs[:count], [None] * shape.layers
    corpus = cast(PackedDataset, Lengths(packs[count:]))
    prices = PackPrices(corpus, contexts, windows)
    began = time.process_time()
    prices.estimated(step, seq_len)
    sampled = time.process_time() - began
    planned, cost = {}, {}
    for degree, context in contexts.items():
        began = time.process_time()
        more = product_seconds(shape, context, seq_len)
        planned[degree] = [prices.planned(lengths, degree) + more for lengths in step]
        cost[degree] = time.process_time() - began
    config = {"seq_len": seq_len, "packs": count, "kind": kind, "model": "8b"}
    recorder.ok(NAME, f"{seq_len}-{kind}-samples", sampled, "s", config=config)
    for world in WORLDS:
        for least in LEAST:
            found = degrees_of(world, least)
            full = {degree: planned[degree] for degree in found}
            best = schedule_step(full, world)
            began = time.process_time()
            estimated = prices.estimated(step, seq_len)
            cheap = {
                c: [t + product_seconds(shape, contexts[c], seq_len) for t in estimated[c]]
                for c in found
            }
            chosen = schedule_step(cheap, world)
            spent = time.process_time() - began
            judged = judge_step(chosen, lambda p, c, full=full: full[c][p], world, world)
            figures = {
                "gain": (judged.gain, "ratio"),
                "gain-by-plans": (best.gain, "ratio"),
                "excess": (judged.seconds / best.seconds - 1, "ratio"),
                "choosing": (spent, "s"),
                "choosing-by-plans": (sum(cost[degree] for degree in found), "s"),
            }
            case = f"{seq_len}-{kind}-cp{world}-min{least}"
            about = config | {"cp": world, "min_cp": least}
            for name, (value, unit) in figures.items():
                recorder.ok(NAME, f"{case}-{name}", value, unit, config=about)
            print(
                f"{case:32} gain {100 * judged.gain:5.1f} % (by plans {100 * best.gain:5.1f} %), "
                f"chosen in {1e3 * spent:.1f} ms (by plans {figures['choosing-by-plans'][0]:.1f} s)"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/degree_gain.jsonl")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--packs", type=int, default=16, help="of a step; a multiple of 4")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    recorder = Recorder(args.out)
    for seq_len in args.seq_len:
        for kind in args.kinds:
            measure(recorder, kind, seq_len, args.packs)


if __name__ == "__main__":
    main()
