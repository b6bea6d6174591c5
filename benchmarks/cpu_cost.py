"""CPU time of two gloo ranks against one process with the same PyTorch op, mask by mask.

    python -m ringattn.benchmarks.cpu_cost [--out FILE] [--seq-len 16384] [--repeats 5]

The figure is (CPU time of the busiest rank) / (CPU time of the baseline / 2): 1.00 means that
sharding costs nothing. CPU time, not wall time, because the latter lies on shared machines; ranks
and baseline take turns within one run. Forward and backward, bfloat16, 8 heads, head dim 64.

Baselines: causal is one SDPA call with two threads. Every other mask takes the cheapest of several
one-process tilings over the same op: the project's own kernel on the whole mask, and per-document
or per-block SDPA calls. The ratio to exact area (baseline: the causal rate times the mask's area)
is printed beside it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ringattn as ra
from ringattn.benchmarks import cpu_tilings
from ringattn.benchmarks.peers.cases import MaskCase
from ringattn.benchmarks.record import Recorder

HEADS, HEAD_DIM, DTYPE = 8, 64, torch.bfloat16
CASES = ("causal", "documents", "window", "shared_question")


def inputs(seq_len: int) -> list[torch.Tensor]:
    """q, k, v, dout of shape (1, S, 8, 64), equal in every process."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, seq_len, HEADS, HEAD_DIM, generator=generator).to(DTYPE) for _ in range(4)
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process while `work` runs."""
    start = time.process_time()
    work()
    return time.process_time() - start


def attend(plan: ra.Plan, qkv: list[torch.Tensor], dout: torch.Tensor) -> None:
    """One forward and backward of this rank's share."""
    q, k, v = qkv
    torch.autograd.backward(ra.attention(q, k, v, plan), dout, inputs=qkv)
    for x in qkv:
        x.grad = None


def rank_worker(rank: int, world: int, store: str, pipe: Connection) -> None:
    """Serves "run CASE" requests: one forward and backward, answered by its CPU seconds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
    cache: dict[tuple[MaskCase, str, str], tuple] = {}
    while (request := pipe.recv()) is not None:
        case, layout, method = request
        if request not in cache:
            cp = ra.ContextParallel(
                None,
                heads=(HEADS, HEADS),
                head_dim=HEAD_DIM,
                dtype=DTYPE,
                layout=layout,
                method=method,
            )
            plan = cp.plan(case.mask())
            *qkv, dout = (plan.shard(x) for x in inputs(case.seq_len))
            cache[request] = (plan, [x.requires_grad_() for x in qkv], dout)
        plan, qkv, dout = cache[request]

        dist.barrier()
        seconds = cpu_seconds(partial(attend, plan, qkv, dout))
        pipe.send((seconds, f"{plan.layout.name}/{plan.method}"))
    dist.destroy_process_group()


def baseline_worker(pipe: Connection) -> None:
    """Serves (case, tiling) requests with two threads, answered by CPU seconds."""
    torch.set_num_threads(2)
    cache: dict[tuple[MaskCase, str], Callable[[], object]] = {}
    while (request := pipe.recv()) is not None:
        case, tiling = request
        if request not in cache:
            cache[request] = cpu_tilings.step(tiling, case, inputs(case.seq_len))
        pipe.send(cpu_seconds(cache[request]))


def corpus_lengths(seq_len: int, seed: int = 0) -> tuple[int, ...]:
    """Document lengths of one pack of the standard library's sources, in bytes."""
    sizes = np.array(
        [p.stat().st_size for p in sorted(Path(argparse.__file__).parent.rglob("*.py"))]
    )
    sizes = np.random.default_rng(seed).permutation(sizes[sizes > 0])
    ends = np.minimum(np.cumsum(sizes), seq_len)
    lengths = np.diff(np.concatenate([[0], ends]))
    return tuple(int(n) for n in lengths[lengths > 0])


def ask(pipes: list[Connection], request: object) -> list:
    """Sends a request to workers and collects their answers."""
    for pipe in pipes:
        pipe.send(request)
    return [pipe.recv() for pipe in pipes]


def measure(case: MaskCase, layout: str, method: str, repeats: int, ranks, single) -> dict:
    """Ratios of one case: medians over interleaved repetitions, the first one discarded."""
    tilings = cpu_tilings.names(case)
    times: dict[str, list[float]] = {name: [] for name in (*tilings, "dense", "ranks")}
    dense = MaskCase("causal", case.seq_len)
    chosen = ""
    for repeat in range(repeats + 1):
        for name in tilings:
            (seconds,) = ask([single], (case, name))
            times[name].append(seconds)
        times["dense"] += ask([single], (dense, "one_call"))
        answers = ask(ranks, (case, layout, method))
        times["ranks"].append(max(seconds for seconds, _ in answers))
        chosen = answers[0][1]
        print(f"  {case.name} {repeat}/{repeats}", end="\r", flush=True)
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    best = min(tilings, key=lambda name: medians[name])
    ratios = [2 * r / b for r, b in zip(times["ranks"][1:], times[best][1:], strict=True)]
    area = case.mask().area / dense.mask().area
    return {
        "ratio": float(np.median(ratios)),
        "spread": float(np.subtract(*np.percentile(ratios, [75, 25])) / 2),
        "to_area": 2 * medians["ranks"] / (medians["dense"] * area),
        "baseline": best,
        "baseline_s": medians[best],
        "busiest_rank_s": medians["ranks"],
        "tilings_s": {name: medians[name] for name in tilings},
        "plan": chosen,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results/cpu_cost.jsonl")
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, workers(Path(folder)) as (ranks, single):
        recorder = Recorder(args.out)
        for name in args.cases:
            lengths = corpus_lengths(args.seq_len) if name != "causal" else ()
            case = MaskCase(name, args.seq_len, lengths)
            found = measure(case, args.layout, args.method, args.repeats, ranks, single)
            print(
                f"{name:16} ratio {found['ratio']:.3f} ± {found['spread']:.3f}   to exact area "
                f"{found['to_area']:.2f}   baseline {found['baseline']}   plan {found['plan']}"
            )
            config = {"seq_len": args.seq_len, "heads": HEADS, "head_dim": HEAD_DIM, "ranks": 2}
            recorder.ok(
                "cpu_cost",
                f"{name}-{args.seq_len}-bf16-p2",
                found["ratio"],
                "ratio",
                spread=found["spread"],
                config=config | {"repeats": args.repeats} | found,
            )


@contextmanager
def workers(folder: Path) -> Iterator[tuple[list[Connection], Connection]]:
    """Two ranks with one thread each and a baseline process with two; stopped at the end."""
    # Idle OpenMP threads must sleep, or waiting would count as CPU time.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for index in range(3):
        here, there = context.Pipe()
        work, args = (
            (rank_worker, (index, 2, str(folder / "store"), there))
            if index < 2
            else (baseline_worker, (there,))
        )
        process = context.Process(target=work, args=args, daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    try:
        yield pipes[:2], pipes[2]
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)


if __name__ == "__main__":
    main()
