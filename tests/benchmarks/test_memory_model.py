"""Predicted against measured bytes of a training step, and the measurement itself."""

import os

import pytest
import torch
import torch.distributed as dist

from ringattn.benchmarks.memory_cases import all_cases, step_case
from ringattn.benchmarks.memory_measure import StepCase, measure_step
from ringattn.benchmarks.memory_trace import MemoryTrace
from tests.ranks import run_ranks

BAR = 0.10


def test_the_trace_sees_every_tensor() -> None:
    """Also those inside of operators, and what was freed again; not what was there before."""
    before = torch.empty(1 << 20, dtype=torch.uint8)

    def body(part) -> None:
        kept = torch.empty(3000, dtype=torch.uint8)
        with part("outer"):
            with part("inner"):
                x = torch.ones(64, 64)
                (x @ x).relu()  # the product lives on while relu writes its own
            torch.empty(500, dtype=torch.uint8)
        assert len(kept) + len(before)

    trace = MemoryTrace(torch.device("cpu")).run(body)
    assert trace.peaks["inner"] == 3000 + 3 * 4 * 64 * 64
    assert trace.peaks["outer"] == trace.peaks["inner"]
    assert sum(a.nbytes for a in trace.largest["inner"]) == trace.peaks["inner"]


CASES = [
    step_case("ddp", "none", "narrow", dtype="fp32", tokens=2048),
    step_case("ddp", "full-tiles", "narrow", tokens=2048, documents=1),
    step_case("fsdp", "attention-tiles-offload", "narrow", tokens=2048, parallel__cp=2),
    step_case("fsdp", "none", "head", tokens=1024, parallel__dp=2),
    step_case("ddp", "sequence", "narrow", tokens=2048, documents=1, parallel__cp=2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_predicted_peak_is_close(case: StepCase) -> None:
    for found in run_ranks(case.world, measure_step, case):
        assert abs(found.error) < BAR, (found.error, found.measured, found.predicted)


@pytest.mark.full
@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.name.replace(" ", "-"))
def test_every_case_of_the_benchmark(case: StepCase) -> None:
    for found in run_ranks(case.world, measure_step, case):
        assert abs(found.error) < BAR, (found.error, found.measured, found.predicted)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "full-tiles", "attention-tiles-offload"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_predicted_peak_is_close_on_a_gpu(engine: str, mode: str) -> None:
    case = step_case(engine, mode, "deep", tokens=16_384)
    assert abs(run_ranks(1, _on_gpu, case)[0]) < BAR


def _on_gpu(rank: int, world: int, _group: object, case: StepCase) -> float:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(0)
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    return measure_step(rank, world, None, case).error
