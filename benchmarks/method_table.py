"""Every method on every layout, priced side by side on a cluster that need not be there.

    python -m ringattn.benchmarks.method_table [--cluster h100_sxm] [--ranks 64] [--out FILE]

64 query and 8 key heads of dim 128, bfloat16, 8K tokens per rank, forward and backward. Speeds are
exact mask FLOPs over the slowest rank's time, per rank. `single` is the same kernel on one rank
that holds the whole sequence. `magi` is area-greedy in chunks of 2,048 with direct moves in two
stages and the kernel ffa, as the published system runs.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

import ringattn as ra
from ringattn import layouts
from ringattn.benchmarks.calibration_rows import typical_packs
from ringattn.benchmarks.cpu_cost import corpus_lengths
from ringattn.benchmarks.record import Recorder
from ringattn.cost import Cluster, load_cluster, peak_bytes, price_pair
from ringattn.errors import UserError
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.methods import METHODS
from ringattn.methods.common import Problem
from ringattn.schedule import Schedule, Shapes

TOKENS = 8192
TILES = 150_000  # more tiles than this are not planned: no launch list should be that long
STAGES = {"direct": (1, 2, 4), "hybrid": (1, 2)}
SHAPES = Shapes(
    q_heads=64, kv_heads=8, qk_dim=128, v_dim=128, itemsize=2, accumulator_itemsize=4
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A way to run a mask: a layout, a method, its options and the kernel it is priced with."""

    layout: str
    method: str
    options: tuple[tuple[str, int], ...] = ()
    kernel: str | None = None

    @property
    def name(self) -> str:
        """The method with its options."""
        return self.method + "".join(f",{key}={value}" for key, value in self.options)


def masks(seq_len: int) -> dict[str, Mask]:
    """The masks of the table, by name."""
    rng = np.random.default_rng(0)
    spread = _filled(np.exp(rng.uniform(np.log(128), np.log(seq_len / 4), seq_len // 128)), seq_len)
    long = _filled(rng.uniform(8192, 30720, seq_len // 8192 + 1), seq_len)
    short = [int(n) for n in typical_packs(seq_len)[1]]
    return {
        "corpus documents": ra.masks.documents(corpus_lengths(seq_len), causal=True),
        "short documents": ra.masks.documents(short, causal=True),
        "log-uniform documents": ra.masks.documents(spread, causal=True),
        "causal": ra.masks.causal(seq_len),
        "window 1024": ra.masks.sliding_window(seq_len, 1023, 0),
        "causal blockwise": ra.masks.causal_blockwise(long),
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
    yield Entry("area_greedy/2048", "direct", (("stages", 2),), "ffa")


def layout_of(name: str, mask: Mask, ranks: int, node: int) -> Layout:
    """A layout by name, with a chunk size after a slash."""
    if name == "area_greedy/2048":
        return layouts.area_greedy(mask, ranks, chunk=2048)
    return layouts.by_name(name, mask, ranks, node)


def measure(entry: Entry, problem: Problem, cluster: Cluster) -> dict:
    """Figures of an entry: times in ms, TFLOP/s per rank, GB received, imbalance, peak GB."""
    problem = replace(problem, options=dict(entry.options))
    start = time.process_time()
    method = METHODS[entry.method]
    schedules = method.forward(problem), method.backward(problem)
    planned = time.process_time()
    priced = price_pair(schedules, cluster, entry.kernel)
    seconds = sum(p.seconds for p in priced)
    received = priced[0].received + priced[1].received
    world = problem.world
    return {
        "layout": entry.layout,
        "method": entry.name,
        "forward_ms": 1e3 * priced[0].seconds,
        "backward_ms": 1e3 * priced[1].seconds,
        "tflops": sum(p.flops for p in priced) / (1e12 * world * seconds),
        "forward_tflops": priced[0].tflops_per_rank,
        "backward_tflops": priced[1].tflops_per_rank,
        "intra_gb_mean": float(received[0].mean()) / 1e9,
        "intra_gb_max": float(received[0].max()) / 1e9,
        "inter_gb_mean": float(received[1].mean()) / 1e9,
        "inter_gb_max": float(received[1].max()) / 1e9,
        "imbalance": max(p.imbalance for p in priced),
        "peak_gb": max(_peak(s) for s in schedules) / 1e9,
        "plan_ms": 1e3 * (planned - start),
        "price_ms": 1e3 * (time.process_time() - planned),
    }


def _peak(schedule: Schedule) -> int:
    return int(peak_bytes(schedule).max())


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
    args = parser.parse_args()
    cluster = load_cluster(args.cluster)
    seq_len = TOKENS * args.ranks
    recorder = Recorder(args.out)
    for name, mask in masks(seq_len).items():
        if not args.masks or name in args.masks:
            rate = single(mask, cluster)
            print(f"\n{name}: {len(mask.bands)} bands, single {rate:.0f} TFLOP/s")
            rows = _rows(recorder, name, mask, cluster, args.ranks, rate)
            _print(sorted(rows, key=lambda r: -r["tflops"])[: args.top or None])


def _rows(
    recorder: Recorder, name: str, mask: Mask, cluster: Cluster, ranks: int, rate: float
) -> list[dict]:
    """Measures and records all entries of a mask."""
    rows = []
    for entry in entries():
        if entry.kernel is not None and entry.kernel not in cluster.kernels:
            continue
        config = {"cluster": cluster.name, "ranks": ranks, "kernel": entry.kernel or cluster.kernel}
        case = f"{name}-{entry.layout}-{entry.name}-{cluster.name}-{ranks}"
        try:
            layout = layout_of(entry.layout, mask, ranks, cluster.ranks_per_node)
            problem = Problem(
                mask=mask, layout=layout, shapes=SHAPES, ranks_per_node=cluster.ranks_per_node
            )
            _check_size(problem)
            found = measure(entry, problem, cluster)
        except UserError as error:
            recorder.refused("method_table", case, "TFLOP/s", str(error), config=config)
            continue
        config |= found | {"single_tflops": rate}
        recorder.ok("method_table", case, found["tflops"], "TFLOP/s", config=config)
        rows.append(found)
    return rows


def _check_size(problem: Problem) -> None:
    # Stripes of one token see every document from every pair of ranks.
    pairs = problem.world**2 if problem.layout.name == "striped" else problem.world
    if pairs * len(problem.mask.bands) > TILES:
        raise UserError(
            f"layout {problem.layout.name}",
            f"cuts {len(problem.mask.bands)} bands into more than {TILES} tiles",
            "choose a layout of longer ranges",
        )


def _print(rows: list[dict]) -> None:
    print(f"{'layout':17} {'method':18} {'fwd ms':>8} {'bwd ms':>8} {'TFLOP/s':>8} {'fwd':>5} "
          f"{'bwd':>5} {'intra GB':>12} {'inter GB':>12} {'imbal.':>7} {'peak GB':>8}")  # fmt: skip
    for r in rows:
        print(
            f"{r['layout']:17} {r['method']:18} {r['forward_ms']:8.2f} {r['backward_ms']:8.2f} "
            f"{r['tflops']:8.0f} {r['forward_tflops']:5.0f} {r['backward_tflops']:5.0f} "
            f"{r['intra_gb_mean']:5.2f} {r['intra_gb_max']:6.2f} {r['inter_gb_mean']:5.2f} "
            f"{r['inter_gb_max']:6.2f} {r['imbalance']:7.2f} {r['peak_gb']:8.2f}"
        )


if __name__ == "__main__":
    main()
