"""Predicted against measured peak bytes of training steps, rank by rank.

    python -m ringattn.benchmarks.memory_model [--only TEXT] [--out FILE]

Runs every case of `memory_cases` in as many gloo ranks of this machine as it needs (one rank on the
GPU where there is one), writes one record per case, with the rank of the largest error, and prints
a table. The exit code is 1 where an error is above 10 %.
"""

import argparse
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ringattn.benchmarks.memory_cases import all_cases
from ringattn.benchmarks.memory_measure import Measured, StepCase, measure_step
from ringattn.benchmarks.record import Recorder

BAR = 0.10
_FORM = "{:58} {:>5} {:>9} {:>9} {:>7}  {}"
_TIMEOUT = timedelta(seconds=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--out", default="memory_model.jsonl", metavar="FILE", help="records")
    arguments = parser.parse_args(argv)
    recorder, worst = Recorder(arguments.out), 0.0
    print(_FORM.format("case", "ranks", "MiB", "predicted", "error", "peak at"))
    for case in all_cases():
        if arguments.only not in case.name:
            continue
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and case.world > 1:
            continue
        config = {"model": case.model, "values": case.values, "device": device}
        try:
            found = run_case(case, device)
        except RuntimeError as error:
            recorder.error("memory-model", case.name, "ratio", str(error), config)
            print(f"{case.name:58} {error}", flush=True)
            worst = float("inf")
            continue
        one = max(found, key=lambda rank: abs(rank.error))
        worst = max(worst, abs(one.error))
        measured = one.measured["step"]
        config |= {"measured_bytes": measured, "predicted_bytes": int(one.peak.nbytes)}
        recorder.ok("memory-model", case.name, one.peak.nbytes / measured, "ratio", config=config)
        shown = [f"{nbytes / 2**20:.1f}" for nbytes in (measured, one.peak.nbytes)]
        moment = one.peak.moment
        print(_FORM.format(case.name, case.world, *shown, f"{one.error:+.1%}", moment), flush=True)
    print(f"largest error {worst:.1%}; bar {BAR:.0%}")
    return int(worst > BAR)


def run_case(case: StepCase, device: str) -> list[Measured]:
    """Every rank's measurement, in processes of their own.

    Raises:
        RuntimeError: a rank failed or did not answer.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(case.world):
            here, there = context.Pipe(duplex=False)
            arguments = rank, case, device, str(Path(folder) / "store"), there
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _answer(rank: int, pipe: Connection) -> Measured:
    try:
        if not pipe.poll(_TIMEOUT.total_seconds()):
            raise RuntimeError(f"rank {rank} did not answer in {_TIMEOUT.total_seconds():g} s")
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if isinstance(answer, str):
        raise RuntimeError(f"rank {rank}: {answer}")
    return answer


def _serve(rank: int, case: StepCase, device: str, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, case.world),
        rank=rank,
        world_size=case.world,
        timeout=_TIMEOUT,
    )
    try:
        pipe.send(measure_step(rank, case.world, None, case))
    except Exception as error:  # any failure is the case's result
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
