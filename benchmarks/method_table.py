"""Every method on every layout, and "auto", priced side by side on a cluster not at hand.

    python -m ringattn.benchmarks.method_table [--cluster h100_sxm] [--ranks 64] [--sweep]

64 query and 8 key heads of dim 128, bfloat16, 8K tokens per rank, forward and backward. Speeds are
exact mask FLOPs over the slowest rank's time, per rank. `single` is the same kernel on one rank
with the whole sequence, `alone` with one rank's tokens under a mask of the same kind. `magi` is
area-greedy in chunks of 2,048 with direct moves in two stages and the kernel ffa, as the published
system runs. Writes one record per figure, and a table and a summary beside it; `--sweep` adds how
far "auto" is from an exhaustive sweep (see `ringattn.benchmarks.method_sweep`).
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import ringattn as ra
from ringattn import layouts
from ringattn.benchmarks.calibration_rows import typical_packs
from ringattn.benchmarks.cpu_cost import corpus_lengths
from ringattn.benchmarks.method_summary import Results, write_summary
from ringattn.benchmarks.method_sweep import Entry, pose, sweep
from ringattn.benchmarks.record import Recorder
from ringattn.cost import Cluster, Priced, load_cluster, peak_bytes, price_pair
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.planner import Quote
from ringattn.schedule import Schedule, Shapes

TOKENS = 8192
BLOCK = 512  # tokens of a block of the block-sparse mask
STAGES = {"direct": (1, 2, 4), "hybrid": (1, 2)}
SHAPES = Shapes(
    q_heads=64, kv_heads=8, qk_dim=128, v_dim=128, itemsize=2, accumulator_itemsize=4
)  # fmt: skip
MAGI = Entry("area_greedy", "direct", (("stages", 2),), (("chunk", 2048),), "ffa")


def masks(seq_len: int) -> dict[str, Mask]:
    """The masks of the table, by name."""
    rng = np.random.default_rng(0)
    spread = _filled(np.exp(rng.uniform(np.log(128), np.log(seq_len / 4), seq_len // 128)), seq_len)
    long = _filled(rng.uniform(8192, 30720, seq_len // 8192 + 1), seq_len)
    short = [int(n) for n in typical_packs(seq_len)[1]]
    sparse = rng.random((seq_len // BLOCK, seq_len // BLOCK)) < 0.1
    return {
        "corpus documents": ra.masks.documents(corpus_lengths(seq_len), causal=True),
        "short documents": ra.masks.documents(short, causal=True),
        "log-uniform documents": ra.masks.documents(spread, causal=True),
        "causal": ra.masks.causal(seq_len),
        "window 1024": ra.masks.sliding_window(seq_len, 1023, 0),
        "causal blockwise": ra.masks.causal_blockwise(long),
        "10 % of blocks": ra.masks.blocks(sparse, BLOCK, BLOCK),
    }


def _filled(lengths: np.ndarray, seq_len: int) -> list[int]:
    ends = np.minimum(np.cumsum(np.maximum(lengths.astype(np.int64), 1)), seq_len)
    sizes = np.diff(np.concatenate([[0], ends, [seq_len]]))
    return [int(n) for n in sizes if n > 0]


def entries() -> Iterator[Entry]:
    """All methods on all layouts, and the published system."""
    for layout in layouts.NAMES:
        for method in METHODS:
            for stages in STAGES.get(method, (0,)):
                yield Entry(layout, method, (("stages", stages),) if stages else ())
    yield Entry("contiguous", "direct", (("stages", 1), ("join", 1)))
    yield Entry(MAGI.layout, MAGI.method, MAGI.options, MAGI.layout_options)
    yield MAGI


def measure(entry: Entry, problem: Problem, cluster: Cluster) -> dict:
    """Figures of an entry: times in ms, TFLOP/s per rank, GB received, imbalance, peak GB."""
    # A problem of its own, so that nothing is counted as planned already.
    problem = Problem(
        mask=problem.mask, layout=problem.layout, shapes=problem.shapes,
        ranks_per_node=problem.ranks_per_node, options=dict(entry.options),
    )  # fmt: skip
    start = time.process_time()
    method = METHODS[entry.method]
    schedules = method.forward(problem), method.backward(problem)
    planned = time.process_time()
    priced = price_pair(schedules, cluster, entry.kernel)
    found = {"layout": entry.place, "method": entry.name} | _figures(
        priced, max(_peak(s) for s in schedules)
    )
    return found | {
        "plan_ms": 1e3 * (planned - start),
        "price_ms": 1e3 * (time.process_time() - planned),
    }


def _figures(priced: tuple[Priced, Priced], peak: int) -> dict:
    seconds = sum(p.seconds for p in priced)
    received = priced[0].received + priced[1].received
    return {
        "forward_ms": 1e3 * priced[0].seconds,
        "backward_ms": 1e3 * priced[1].seconds,
        "tflops": sum(p.flops for p in priced) / (1e12 * len(priced[0].compute) * seconds),
        "forward_tflops": priced[0].tflops_per_rank,
        "backward_tflops": priced[1].tflops_per_rank,
        "intra_gb_mean": float(received[0].mean()) / 1e9,
        "intra_gb_max": float(received[0].max()) / 1e9,
        "inter_gb_mean": float(received[1].mean()) / 1e9,
        "inter_gb_max": float(received[1].max()) / 1e9,
        "imbalance": max(p.imbalance for p in priced),
        "peak_gb": peak / 1e9,
    }


def _peak(schedule: Schedule) -> int:
    return int(peak_bytes(schedule).max())


def chosen(mask: Mask, ranks: int, cluster: Cluster) -> dict:
    """Figures of what "auto" chooses, and the milliseconds that the choice takes."""
    context = ra.ContextParallel(
        ranks, heads=(SHAPES.q_heads, SHAPES.kv_heads), head_dim=SHAPES.qk_dim,
        dtype=torch.bfloat16, cluster=cluster,
    )  # fmt: skip
    start = time.process_time()
    best: Quote = context.compare(mask).best
    cold = time.process_time() - start
    found = {"layout": best.layout.name, "method": f"auto: {best.candidate}"}
    return found | _figures(best.priced, best.peak_bytes) | {"plan_ms": 1e3 * cold}


def single(mask: Mask, cluster: Cluster) -> float:
    """TFLOP/s of the kernel, forward and backward, on one rank that holds the whole sequence."""
    layout = layouts.contiguous(mask.seq_len, 1)
    problem = Problem(mask=mask, layout=layout, shapes=SHAPES, ranks_per_node=1)
    return measure(Entry("contiguous", "ring"), problem, cluster)["tflops"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/method_table.jsonl")
    parser.add_argument("--cluster", default="h100_sxm", help="a name or a YAML file")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--masks", nargs="*", help="names of masks; default all")
    parser.add_argument("--top", type=int, default=0, help="print the fastest only; 0: all")
    parser.add_argument("--sweep", action="store_true", help="hold auto against everything")
    args = parser.parse_args()
    cluster, ranks = load_cluster(args.cluster), args.ranks
    recorder, results = Recorder(args.out), Results(cluster.name, ranks, TOKENS)
    alone = masks(TOKENS)
    for name, mask in masks(TOKENS * ranks).items():
        if args.masks and name not in args.masks:
            continue
        rate, small = single(mask, cluster), single(alone[name], cluster)
        print(f"\n{name}: {len(mask.bands)} bands, single {rate:.0f}, alone {small:.0f} TFLOP/s")
        rows = [*_rows(recorder, name, mask, cluster, ranks), chosen(mask, ranks, cluster)]
        case = f"{name}-auto-{cluster.name}-{ranks}"
        recorder.ok("method_table", case, rows[-1]["tflops"], "TFLOP/s", config=rows[-1])
        best = None
        if args.sweep:
            best = _swept(recorder, name, mask, cluster, ranks, rows[-1])
        results.add(name, rows, rate, small, best)
        _print(sorted(rows, key=lambda r: -r["tflops"])[: args.top or None])
    write_summary(results, Path(args.out).with_suffix(".md"), Path(args.out).with_suffix(".json"))


def _rows(recorder: Recorder, name: str, mask: Mask, cluster: Cluster, ranks: int) -> list[dict]:
    """Measures and records all entries of a mask."""
    rows = []
    for entry in entries():
        if entry.kernel is not None and entry.kernel not in cluster.kernels:
            continue
        config = {"cluster": cluster.name, "ranks": ranks, "kernel": entry.kernel or cluster.kernel}
        kernel = f"-{entry.kernel}" if entry.kernel else ""
        case = f"{name}-{entry.place}-{entry.name}{kernel}-{cluster.name}-{ranks}"
        try:
            problem = pose(entry, mask, SHAPES, ranks, cluster.ranks_per_node)
            if problem is None:
                raise UserError(
                    f"layout {entry.place}", "has too many tiles", "choose longer ranges"
                )
            found = measure(entry, problem, cluster)
        except UserError as error:
            recorder.refused("method_table", case, "TFLOP/s", str(error), config=config)
            continue
        found["method"] += f",{entry.kernel}" if entry.kernel else ""
        recorder.ok("method_table", case, found["tflops"], "TFLOP/s", config=config | found)
        rows.append(found)
    return rows


def _swept(
    recorder: Recorder, name: str, mask: Mask, cluster: Cluster, ranks: int, auto: dict
) -> dict:
    """The best of the exhaustive sweep, recorded with auto's distance from it."""
    found = sweep(mask, SHAPES, ranks, cluster)
    seconds, entry = found[0]
    ours = (auto["forward_ms"] + auto["backward_ms"]) / 1e3
    best = {
        "priced": len(found), "layout": entry.place, "method": entry.name,
        "ms": 1e3 * seconds, "auto_ms": 1e3 * ours, "auto_over_best": ours / seconds,
        "next": [f"{e.name} over {e.place}: {1e3 * s:.2f} ms" for s, e in found[1:6]],
    }  # fmt: skip
    case = f"{name}-auto-over-sweep-{cluster.name}-{ranks}"
    recorder.ok("method_sweep", case, ours / seconds, "ratio", config=best)
    print(f"sweep of {len(found)}: {entry.name} over {entry.place}, {1e3 * seconds:.2f} ms; "
          f"auto needs {100 * (ours / seconds - 1):.1f} % more")  # fmt: skip
    return best


def _print(rows: list[dict]) -> None:
    print(f"{'layout':22} {'method':30} {'fwd ms':>8} {'bwd ms':>8} {'TFLOP/s':>8} {'fwd':>5} "
          f"{'bwd':>5} {'intra GB':>12} {'inter GB':>12} {'imbal.':>7} {'peak GB':>8}")  # fmt: skip
    for r in rows:
        print(
            f"{r['layout']:22} {r['method']:30} {r['forward_ms']:8.2f} {r['backward_ms']:8.2f} "
            f"{r['tflops']:8.0f} {r['forward_tflops']:5.0f} {r['backward_tflops']:5.0f} "
            f"{r['intra_gb_mean']:5.2f} {r['intra_gb_max']:6.2f} {r['inter_gb_mean']:5.2f} "
            f"{r['inter_gb_max']:6.2f} {r['imbalance']:7.2f} {r['peak_gb']:8.2f}"
        )


if __name__ == "__main__":
    main()
