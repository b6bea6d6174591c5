"""Time to plan: tiles and both schedules for a million tokens on 64 ranks.

    python -m ringattn.benchmarks.planning [--out FILE] [--repeats 9]

CPU time of one core, layout included, for causal documents (about 600, log-normal lengths), a
causal mask and a causal window, with each method on each layout; and of "auto" on a cluster, cold
and with the plan in the cache.
"""

import argparse
import time

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.record import Recorder
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.schedule import Shapes

SEQ_LEN, WORLD = 1 << 20, 64
LAYOUTS = ("contiguous", "zigzag", "area_greedy", "node_balanced", "hybrid")


def document_lengths(seq_len: int = SEQ_LEN, count: int = 600, seed: int = 0) -> list[int]:
    """About `count` log-normal lengths that fill the sequence."""
    raw = np.random.default_rng(seed).lognormal(6.5, 1.2, count)
    lengths = np.maximum((raw * seq_len / raw.sum()).astype(int), 1)
    lengths[-1] += seq_len - lengths.sum()
    return [int(n) for n in lengths]


def masks() -> list[ra.Mask]:
    """The masks that are planned."""
    return [
        ra.masks.documents(document_lengths(), causal=True),
        ra.masks.causal(SEQ_LEN),
        ra.masks.sliding_window(SEQ_LEN, 1023, 0),
    ]


def plan_once(mask: ra.Mask, layout: str, method: str) -> tuple[float, int, int]:
    """Milliseconds, tasks and moves of one planning, forward and backward."""
    shapes = Shapes(
        q_heads=64, kv_heads=8, qk_dim=128, v_dim=128, itemsize=2, accumulator_itemsize=4
    )
    start = time.process_time()
    problem = Problem(
        mask=mask,
        layout=ra.layouts.by_name(layout, mask, WORLD, 8),
        shapes=shapes,
        ranks_per_node=8,
    )
    schedules = METHODS[method].forward(problem), METHODS[method].backward(problem)
    elapsed = 1000 * (time.process_time() - start)
    return elapsed, sum(len(s.tasks) for s in schedules), sum(len(s.moves) for s in schedules)


def choose_once(mask: ra.Mask) -> tuple[float, float]:
    """Milliseconds until "auto" has a plan, the first time and the second."""
    context = ra.ContextParallel(
        WORLD, heads=(64, 8), head_dim=128, dtype=torch.bfloat16, cluster="h100_sxm"
    )
    times = [time.process_time()]
    for _ in range(2):
        context.plan(mask)
        times.append(time.process_time())
    return 1000 * (times[1] - times[0]), 1000 * (times[2] - times[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/planning.jsonl")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    recorder = Recorder(args.out)
    for mask in masks():
        for layout in LAYOUTS:
            for method in METHODS:
                runs = [plan_once(mask, layout, method) for _ in range(args.repeats)]
                times = [milliseconds for milliseconds, _, _ in runs]
                config = {
                    "seq_len": SEQ_LEN, "world": WORLD, "bands": len(mask.bands),
                    "tasks": runs[0][1], "moves": runs[0][2], "repeats": args.repeats,
                }  # fmt: skip
                median = float(np.median(times))
                spread = float(np.subtract(*np.percentile(times, [75, 25])) / 2)
                case = f"{mask.name}-{layout}-{method}"
                recorder.ok("planning", case, median, "ms", spread=spread, config=config)
                print(f"{case:40} {median:7.1f} ms ± {spread:.1f}   tasks {runs[0][1]}")
        chosen = [choose_once(mask) for _ in range(args.repeats)]
        for name, times in zip(("cold", "warm"), zip(*chosen, strict=True), strict=True):
            case = f"{mask.name}-auto-{name}"
            median = float(np.median(times))
            config = {"seq_len": SEQ_LEN, "world": WORLD, "bands": len(mask.bands)}
            recorder.ok("planning", case, median, "ms", config=config)
            print(f"{case:40} {median:7.2f} ms")


if __name__ == "__main__":
    main()
