"""``ringattn doctor``: a sound group is found right, and whatever is broken is named."""

import contextlib
import datetime
import io
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ringattn.cost import load_cluster, parse_cluster
from ringattn.kernels import CpuFlashKernel
from ringattn.launch import doctor_host, doctor_steps
from ringattn.launch.config import Config
from ringattn.launch.doctor import examine
from ringattn.launch.doctor_board import Board
from ringattn.launch.doctor_cluster import Measured, base_cluster, cluster_text
from ringattn.launch.doctor_links import PairResult, Round, link_rounds, merge_round
from ringattn.launch.doctor_methods import CellResult, cells_for, merge_cell
from ringattn.launch.doctor_rates import Work, name_slow
from ringattn.launch.doctor_report import Report, as_json
from ringattn.launch.doctor_steps import Examination, Request
from ringattn.launch.failure import AlreadyToldError
from ringattn.launch.main import main
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.methods import METHODS
from ringattn.parallel.fabric import Handle, ProcessGroupFabric
from ringattn.schedule import Lane
from tests.launch.training import run_command
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)
LANES = ("intra", "inter")
TINY = Work(
    gemm={torch.float32: 32},
    tokens=64,
    heads=(2, 1),
    head_dim=16,
    dtype=torch.float32,
    copy=1 << 16,
    host_copy=0,
    budget=0.001,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)


# --- who meets whom ---


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("node", [1, 2, 3, 4, 8])
def test_every_pair_meets_once_on_its_lane(world: int, node: int) -> None:
    node = min(node, world)
    rounds = link_rounds(world, node)
    met = []
    for found in rounds:
        ranks = [rank for pair in found.pairs for rank in pair]
        assert len(set(ranks)) == len(ranks), f"a rank stands in two pairs of {found}"
        for a, b in found.pairs:
            assert (found.lane == Lane.INTRA) == (a // node == b // node)
            met.append((min(a, b), max(a, b)))
    assert sorted(met) == [(a, b) for a in range(world) for b in range(a + 1, world)]


def test_a_large_world_meets_its_neighbours_in_few_rounds() -> None:
    rounds = link_rounds(512, 8)
    assert len(rounds) < 100
    met = {(min(p), max(p)) for found in rounds for p in found.pairs}
    assert all(len({r for p in f.pairs for r in p}) == 2 * len(f.pairs) for f in rounds)
    for distance in (1, 2, 8, 16, 64, 256):
        assert (0, distance) in met
    assert {rank for pair in met for rank in pair} == set(range(512))


# --- sound groups ---


def _session(rank: int, world: int) -> Session:
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    return Session(ranks=ranks, device=torch.device("cpu"), timeout=timedelta(seconds=60))


def _examine(
    rank: int, world: int, group: Any, mutation: str | None, request: Request
) -> dict[str, Any]:
    """Report, output and exit code of one rank of a group in which something may be broken."""
    del group
    out, code = io.StringIO(), 0
    reports: list[Report] = []
    run = Examination.run

    def keep(self: Examination) -> Report:
        reports.append(run(self))
        return reports[0]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(doctor_steps, "work_for", return_value=TINY))
        stack.enter_context(mock.patch.object(Examination, "run", keep))
        if mutation is not None:
            stack.enter_context(MUTATIONS[mutation](rank))
        stack.enter_context(contextlib.redirect_stdout(out))
        try:
            examine(request, Config(), _session(rank, world))
        except AlreadyToldError:
            code = 1
    return {"report": as_json(reports[0]), "out": out.getvalue(), "code": code}


QUICK = Request(quick=True, timeout=30.0)


@pytest.mark.parametrize("world", [2, 3])
def test_a_sound_group_is_right(world: int, tmp_path: Path) -> None:
    files = Request(
        quick=world == 3,
        timeout=30.0,
        json_file=str(tmp_path / "found.json"),
        out=str(tmp_path / "cluster.yaml"),
    )
    results = run_ranks(world, _examine, None, files)
    report = json.loads((tmp_path / "found.json").read_text())
    assert [r["code"] for r in results] == [0] * world, results[0]["out"]
    assert results[0]["out"].splitlines()[-1] == "all is right"
    assert all(not r["out"] for r in results[1:]), "rank 0 alone talks"
    assert report["ok"]
    assert report["wrong"] == []
    assert [pair["ranks"] for pair in report["pairs"]].count([0, 1]) == 1
    assert len(report["pairs"]) == world * (world - 1) // 2
    assert all(pair["gbs"] > 0 and pair["latency_us"] > 0 for pair in report["pairs"])
    cells = report["cells"]
    assert len(cells) == len(METHODS) * (2 if world == 3 else 6)
    assert {cell["status"] for cell in cells.values()} <= {"ok", "refused"}
    assert {name.split(" × ")[0] for name, c in cells.items() if c["status"] == "ok"} == {*METHODS}
    # The planner reads what was written, and its figures are the measured ones.
    cluster = load_cluster(tmp_path / "cluster.yaml")
    assert cluster.ranks_per_node == world
    assert cluster.intra.gbs == pytest.approx(report["links"]["intra"]["gbs"], rel=0.01)
    assert cluster.inter == load_cluster("cpu_gloo").inter
    assert main(["plan", "debug", "--cluster", str(tmp_path / "cluster.yaml")]) == 0


def test_nodes_are_measured_apart(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    request = Request(quick=True, timeout=30.0, out=str(out))
    results = run_ranks(4, _examine, "two nodes", request)
    report = results[0]["report"]
    assert [r["code"] for r in results] == [0] * 4, results[0]["out"]
    lanes = {lane: [p["ranks"] for p in report["pairs"] if p["lane"] == lane] for lane in LANES}
    assert sorted(lanes["intra"]) == [[0, 1], [2, 3]]
    assert sorted(lanes["inter"]) == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert "double_ring × causal" in report["cells"], "on the real nodes"
    cluster = load_cluster(out)
    assert cluster.ranks_per_node == 2
    # Both ranks of a node exchanged at once, over one NIC.
    assert cluster.inter.gbs == pytest.approx(2 * report["links"]["inter"]["gbs"], rel=0.01)


# --- broken groups ---


def _two_nodes(rank: int) -> Any:
    """No fault: four ranks on two nodes."""
    del rank
    return mock.patch.object(doctor_host, "node_size", return_value=2)


def _corrupt_bytes(rank: int) -> Any:
    """A link that changes one byte of large messages on their way from rank 1 to rank 2."""
    exchange = ProcessGroupFabric.exchange

    class Corrupting:
        def __init__(self, handle: Handle, taken: list[torch.Tensor]) -> None:
            self.handle, self.taken = handle, taken

        def wait(self) -> None:
            self.handle.wait()
            for tensor in self.taken:
                tensor[4711] ^= 1

    def broken(self: ProcessGroupFabric, sends: Any, recvs: Any, **how: Any) -> Handle:
        taken = [t for peer, t in recvs if (peer, rank) == (1, 2) and t.numel() > 1 << 16]
        return Corrupting(exchange(self, sends, recvs, **how), taken)

    return mock.patch.object(ProcessGroupFabric, "exchange", broken)


def _break_link(rank: int) -> Any:
    """A link between ranks 0 and 2 that fails on one of them."""
    exchange = ProcessGroupFabric.exchange

    def broken(self: ProcessGroupFabric, sends: Any, recvs: Any, **how: Any) -> Handle:
        if rank == 2 and any(peer == 0 for peer, _ in recvs):
            raise RuntimeError("no route to host")
        if rank == 0 and any(peer == 2 for peer, _ in recvs):
            raise RuntimeError("connection closed")
        return exchange(self, sends, recvs, **how)

    return mock.patch.object(ProcessGroupFabric, "exchange", broken)


def _wrong_gradient(rank: int) -> Any:
    """A kernel on rank 1 whose dk is a little too large."""
    backward = CpuFlashKernel.backward

    def broken(self: CpuFlashKernel, *args: Any, **how: Any) -> None:
        backward(self, *args, **how)
        args[8].mul_(1.001)

    return mock.patch.object(CpuFlashKernel, "backward", broken if rank == 1 else backward)


def _unrepeatable(rank: int) -> Any:
    """A kernel on rank 0 that gives other last bits every time."""
    forward, calls = CpuFlashKernel.forward, []

    def broken(self: CpuFlashKernel, *args: Any, **how: Any) -> None:
        forward(self, *args, **how)
        calls.append(1)
        args[4].mul_(1 + len(calls) * 2.0**-50)

    return mock.patch.object(CpuFlashKernel, "forward", broken if rank == 0 else forward)


def _raising_kernel(rank: int) -> Any:
    """A kernel that raises on every rank, as one that was compiled for another GPU."""
    del rank

    def broken(self: CpuFlashKernel, *args: Any, **how: Any) -> None:
        raise RuntimeError("no kernel image")

    return mock.patch.object(CpuFlashKernel, "forward", broken)


def _other_version(rank: int) -> Any:
    found = doctor_host.find_versions()
    if rank == 1:
        found |= {"torch": "2.0.0"}
    return mock.patch.object(doctor_host, "find_versions", return_value=found)


MUTATIONS: dict[str, Callable[[int], Any]] = {
    "two nodes": _two_nodes,
    "corrupt": _corrupt_bytes,
    "broken link": _break_link,
    "gradient": _wrong_gradient,
    "unrepeatable": _unrepeatable,
    "raising kernel": _raising_kernel,
    "version": _other_version,
}


def _wrong(world: int, mutation: str) -> list[str]:
    """What is wrong in a group with a fault, which every rank must know alike."""
    results = run_ranks(world, _examine, mutation, QUICK)
    assert [r["code"] for r in results] == [1] * world
    assert all(r["report"]["wrong"] == results[0]["report"]["wrong"] for r in results)
    last = results[0]["out"].splitlines()
    assert last[-1].endswith("wrong")
    assert any(line.startswith("WRONG: ") for line in last)
    return results[0]["report"]["wrong"]


def test_a_link_that_corrupts_a_byte_names_its_pair() -> None:
    link, *cells = _wrong(3, "corrupt")
    want = "from rank 1 to rank 2: 1 of 1,048,576 bytes wrong, the first at 4,711"
    assert link == f"ranks 1 and 2: {want}"
    assert all(" × " in line for line in cells), "no other pair"


def test_a_version_of_its_own_names_the_rank() -> None:
    (line,) = _wrong(2, "version")
    assert line.startswith("rank 1 (host ")
    assert f"torch 2.0.0, rank 0 has {torch.__version__}" in line


def test_a_wrong_gradient_names_its_cells() -> None:
    lines = _wrong(2, "gradient")
    assert any(line.startswith("ring × causal: dk is wrong on rank") for line in lines), lines
    assert {line.split(" × ")[0] for line in lines} == {*METHODS}


def test_other_bits_in_a_second_run_name_the_cell() -> None:
    lines = _wrong(2, "unrepeatable")
    assert "ring × causal: two runs on rank 0 gave different bits" in lines


def _broken(rank: int, world: int, group: Any, mutation: str) -> dict[str, Any]:
    """The report on a group whose ranks can no longer work together."""
    found = _examine(rank, world, group, mutation, QUICK)
    assert found["code"] == 1
    return found["report"]


def test_a_link_that_fails_names_its_pair_and_ends_the_examination() -> None:
    results = run_ranks(3, _broken, "broken link")
    (line,) = results[0]["wrong"]
    assert line.startswith("ranks 0 and 2: rank 0: RuntimeError: connection closed; rank 2: ")
    assert all(r["broken"] and r["wrong"] == [line] for r in results)
    assert not results[0]["rates"]
    assert not results[0]["cells"]


def test_a_kernel_that_raises_is_named() -> None:
    results = run_ranks(2, _broken, "raising kernel")
    assert results[0]["broken"]
    assert all("no kernel image" in line for line in results[0]["wrong"])


def _silent(rank: int, world: int, group: Any) -> list[str]:
    """Rank 1 answers the first step and then no more."""
    del group
    board = Board.open(rank, world, 1.0, grace=0.5)
    examination = Examination(Request(quick=True, timeout=1.0), _session(rank, world), board)
    if rank == 1:
        board.share("ranks", doctor_host.describe_rank(examination.session))
        return []
    report = examination.run()
    assert report.broken
    return report.wrong


def test_a_silent_rank_is_named() -> None:
    lines = run_ranks(2, _silent)[0]
    assert len(lines) == 1
    assert lines[0].startswith("rank 1 (host ")
    assert "did not answer within 1 s in step opening links" in lines[0]


# --- what answers are made of ---


def test_answers_of_a_pair_are_the_worse_of_both() -> None:
    found = Round(Lane.INTER, ((0, 2),))
    answers = [
        {"latency_us": 5.0, "gbs": 3.0, "wrong": ""},
        {},
        {"latency_us": 7.0, "gbs": 2.0, "wrong": ""},
    ]
    (pair,) = merge_round(found, answers)
    assert pair == PairResult(lane="inter", ranks=(0, 2), latency_us=7.0, gbs=2.0)


def test_the_cause_of_a_failure_comes_before_those_who_waited() -> None:
    late = CellResult(status="failed", message="timed out", rank=0, silent=True)
    cause = CellResult(status="failed", message="out of memory", rank=3)
    good = CellResult(status="ok", rank=1)
    assert merge_cell([late, good, cause]) is cause
    refusal = CellResult(status="refused", message="odd", rank=1)
    assert merge_cell([refusal, refusal]).status == "refused"
    assert merge_cell([good, refusal]).status == "failed", "ranks must refuse alike"


def test_slow_ranks_are_named() -> None:
    rates = [{"memory_gbs": 10.0}, {"memory_gbs": 7.9}, {"memory_gbs": 9.9}, {"memory_gbs": 10.1}]
    (line,) = name_slow(rates, ["a", "b", "c", "d"])
    assert line.startswith("rank 1 (host b): memory_gbs 7.9")


def test_methods_that_look_at_nodes_see_two() -> None:
    cells = cells_for(["causal"], 4, 4)
    assert cells["double_ring"][0].node == 2
    assert cells["ring"][0].node == 4
    assert cells_for(["causal"], 8, 4)["usp"][0].node == 4


def test_what_may_differ_between_ranks_is_no_finding() -> None:
    first = _gpu_measured("NVIDIA H200").facts[0]
    less = {**first, "device": {**first["device"], "memory_gib": 139.5}}
    assert doctor_host.compare_ranks([first, less]) == []
    other = {**first, "device": {**first["device"], "name": "NVIDIA H100"}}
    (line,) = doctor_host.compare_ranks([first, other])
    assert line == "rank 1 (host a): name NVIDIA H100, rank 0 has NVIDIA H200"
    small = {**first, "host": {**first["host"], "ranks": 4}}
    assert doctor_host.uneven_hosts([first, first]) == []
    assert doctor_host.uneven_hosts([first, small]) == [
        "hosts hold different numbers of ranks: 4, 8"
    ]


def _gpu_measured(name: str) -> Measured:
    fact = {
        "host": {"name": "a", "ranks": 8, "cores": 96, "memory_gib": 1600.0},
        "versions": {},
        "device": {"type": "cuda", "name": name, "memory_gib": 139.8, "cores": 132},
    }
    rates = {
        "gemm_bf16_tflops": 700.0, "forward_tflops": 500.0, "backward_tflops": 400.0,
        "forward_seconds": 0.002, "backward_seconds": 0.005, "kernel": "cudnn",
        "memory_gbs": 3800.0, "to_device_gbs": 54.0, "to_host_gbs": 50.0,
    }  # fmt: skip
    links = {
        "intra": {"gbs": 150.0, "latency_us": 20.0},
        "inter": {"gbs": 24.0, "latency_us": 30.0},
    }
    work = Work(
        gemm={}, tokens=4096, heads=(16, 4), head_dim=128, dtype=torch.bfloat16,
        copy=1, host_copy=1, budget=0.0,
    )  # fmt: skip
    return Measured(facts=[fact] * 16, node=8, links=links, rates=[rates] * 16, work=work)


def test_a_known_gpu_takes_its_data_sheet() -> None:
    text = cluster_text(_gpu_measured("NVIDIA H200"), datetime.date(2026, 1, 2))
    cluster, base = parse_cluster(text, "measured"), load_cluster("h200_sxm")
    assert text.startswith("# Written by ringattn doctor on 2026-01-02.")
    assert cluster.peak_tflops == base.peak_tflops
    assert cluster.gemm_share == pytest.approx(700 / 989, rel=0.01)
    assert (cluster.intra.gbs, cluster.inter.gbs) == (150.0, 24.0)
    assert (cluster.host_gbs, cluster.memory_gib, cluster.host_gib) == (50.0, 140.0, 200.0)
    assert set(cluster.kernels) == {"cudnn"}
    assert cluster.overlap_tax == base.overlap_tax


def test_shared_nics_carry_what_their_ranks_carried_together() -> None:
    measured = _gpu_measured("NVIDIA A800-SXM4-80GB")
    assert base_cluster(measured.facts[0]["device"]) == "a800_sxm"
    cluster = parse_cluster(cluster_text(measured, datetime.date(2026, 1, 2)), "measured")
    assert cluster.inter.gbs == 2 * 24.0, "8 ranks shared 4 NICs"


def test_an_unknown_gpu_has_no_data_sheet() -> None:
    cluster = parse_cluster(
        cluster_text(_gpu_measured("Some GPU"), datetime.date(2026, 1, 2)), "measured"
    )
    assert cluster.peak_tflops == pytest.approx(1000.0)


# --- the command ---


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ranks", "0"], "--ranks 0"),
        (["--timeout", "0"], "--timeout 0"),
        (["--ranks", "1", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json"),
        (["--ranks", "1", "--out", "no/such/folder/x.yaml"], "--out no/such/folder/x.yaml"),
        (["--ranks", "1", "--out", "."], "--out ."),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x]
    assert line.startswith(f"ringattn: {words}")


def test_the_command_runs_local_ranks(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    arguments = ("doctor", "--quick", "--device", "cpu", "--out", str(out))
    code, text, err = run_command(*arguments)
    assert code == 0, text + err
    assert text.splitlines()[-1] == "all is right"
    assert "ranks  2, 2 per node" in text
    assert load_cluster(out).name == "measured"


def test_one_rank_has_no_links(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(doctor_steps, "work_for", return_value=TINY):
        assert main(["doctor", "--quick", "--device", "cpu", "--ranks", "1"]) == 0
    assert "links" not in capsys.readouterr().out.split("seconds")[0]
    assert not dist.is_initialized()


def test_what_is_wrong_ends_the_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        mock.patch.object(doctor_steps, "work_for", return_value=TINY),
        _wrong_gradient(1),
    ):
        assert main(["doctor", "--quick", "--device", "cpu", "--ranks", "1"]) == 1
    streams = capsys.readouterr()
    assert "WRONG: ring × causal: dk is wrong on rank 0" in streams.out
    assert "Traceback" not in streams.err


@pytest.mark.full
def test_the_command_under_torchrun() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3")
    code, text, err = run_command("doctor", "--quick", "--device", "cpu", launcher=launcher)
    assert code == 0, text + err
    assert "ranks  3, 3 per node" in text
