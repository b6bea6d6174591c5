"""ringattn against its peers on real gloo ranks: bytes on the wire, CPU time, wall time, errors.

    python -m ringattn.benchmarks.measured_methods [--world 2 4] [--seq-len 8192] [--json FILE]

Attention forward and backward, float32, 8 query and 2 key heads of dim 64. Every result is first
held against a float64 reference; a wrong one is reported and not timed. Then all contenders take
turns, in an order that moves on by one each round. CPU time is summed over ranks and is the figure
to read: wall time lies on shared machines. Ratios are ringattn over the peer within a round.

A mask at a number of ranks is one unit: the file holds all of its records or none, and units that
it holds are not measured again. Beside the file a table (.md) and a plot (.png) are written. On two
quiet cores 8,192 tokens take about three minutes, 16,384 about four per number of ranks.
"""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ringattn.benchmarks.blocked_reference import blocked_reference
from ringattn.benchmarks.measured_report import write_report
from ringattn.benchmarks.peer_measure import Outcome, Pools, measure, show
from ringattn.benchmarks.peers import OURS, YARDSTICK, contenders, variants
from ringattn.benchmarks.peers.base import Contender, Shape
from ringattn.benchmarks.peers.cases import NAMES, MaskCase, mask_case
from ringattn.benchmarks.peers.patterns import WINDOW
from ringattn.benchmarks.record import Recorder

NAME = "measured_methods"


def case_name(case: MaskCase, world: int, shape: Shape, contender: str) -> str:
    """The name of a record."""
    heads = f"h{shape.q_heads}x{shape.kv_heads}-d{shape.head_dim}"
    return f"{case.name}-{case.seq_len}-{heads}-fp32-p{world}-{contender}"


def record(
    recorder: Recorder, case: MaskCase, world: int, shape: Shape, found: list[Outcome]
) -> None:
    """Writes the records of a unit. The first outcome is ringattn's, which the ratios are of."""
    ours = found[0]
    for outcome in found:
        name = case_name(case, world, shape, outcome.contender.name)
        config = {
            "mask": case.name,
            "seq_len": case.seq_len,
            "documents": len(case.lengths),
            "window": case.window if case.pattern == WINDOW else None,
            "heads": [shape.q_heads, shape.kv_heads],
            "head_dim": shape.head_dim,
            "ranks": world,
            "contender": outcome.contender.name,
            "version": outcome.contender.installed(),
            "how": outcome.note,
            "errors": outcome.errors,
        }
        if outcome.status == "refused":
            recorder.refused(NAME, name, "s", outcome.reason, config)
        elif outcome.status == "error":
            recorder.error(NAME, name, "s", outcome.reason, config)
        else:
            config |= _figures(outcome, ours)
            value, spread = _median(outcome.cpu_s)
            recorder.ok(NAME, name, value, "s", spread=spread, config=config)


def _figures(outcome: Outcome, ours: Outcome) -> Mapping[str, object]:
    wall, wall_spread = _median(outcome.wall_s)
    figures: dict[str, object] = {
        "rounds": len(outcome.cpu_s),
        "wall_s": wall,
        "wall_spread_s": wall_spread,
        "sent_bytes": outcome.sent_bytes,
    }
    if ours.status == "ok":
        ratios = [a / b for a, b in zip(ours.cpu_s, outcome.cpu_s, strict=True)]
        figures["cpu_ratio"], figures["cpu_ratio_spread"] = _median(ratios)
    return figures


def _median(values: list[float]) -> tuple[float, float]:
    """Median and half the interquartile range."""
    return float(np.median(values)), float(np.subtract(*np.percentile(values, [75, 25])) / 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("HQ", "HKV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--masks", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--json", default=f"benchmarks/results/{NAME}.jsonl", help="records")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="to time a mask at a number of ranks"
    )
    parser.add_argument("--variants", action="store_true", help="also ringattn's fixed methods")
    args = parser.parse_args()
    if min(args.world) < 2:
        parser.error("--world needs at least 2 ranks")
    q_heads, kv_heads = args.heads
    shape = Shape(q_heads, kv_heads, args.head_dim)
    rivals = (OURS, *contenders(), YARDSTICK, *(variants() if args.variants else ()))
    recorder = Recorder(args.json)
    with ExitStack() as stack:
        pools = Pools(stack)
        for mask in args.masks:
            _measure_mask(mask_case(mask, args.seq_len), args, shape, rivals, recorder, pools)
    write_report(Path(args.json), args.seq_len)


def _measure_mask(
    case: MaskCase,
    args: argparse.Namespace,
    shape: Shape,
    rivals: tuple[Contender, ...],
    recorder: Recorder,
    pools: Pools,
) -> None:
    """Measures and records a mask at every number of ranks that the file does not hold yet."""
    worlds = [
        world
        for world in args.world
        if not all(recorder.has(NAME, case_name(case, world, shape, r.name)) for r in rivals)
    ]
    if not worlds:
        print(f"{case.name}: in the file already")
        return
    show(case, worlds[0], "float64 reference")
    reference = blocked_reference(shape.inputs(case.seq_len), case.mask())
    for world in worlds:
        found = measure(case, world, shape, rivals, reference, pools, args.seconds)
        record(recorder, case, world, shape, found)
        for outcome in found:
            cpu = f"{np.median(outcome.cpu_s):8.3f} s" if outcome.cpu_s else outcome.reason
            print(f"{case.name}, {world} ranks, {outcome.contender.name}: {cpu}".ljust(78))


if __name__ == "__main__":
    main()
