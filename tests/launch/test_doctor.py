"""``ringattn doctor``: a sound group is found right, and whatever is broken is named."""

import contextlib
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

from ringattn.cost import load_cluster
from ringattn.kernels import CpuFlashKernel
from ringattn.launch import doctor_host, doctor_steps
from ringattn.launch.config import Config
from ringattn.launch.doctor import examine
from ringattn.launch.doctor_board import Board
from ringattn.launch.doctor_rates import Work
from ringattn.launch.doctor_report import Report, as_json
from ringattn.launch.doctor_steps import Examination, Request
from ringattn.launch.failure import AlreadyToldError
from ringattn.launch.main import main
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.methods import METHODS
from ringattn.parallel.fabric import Handle, ProcessGroupFabric
from tests.launch.training import run_command
from tests.ranks import run_ranks

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


# --- sound groups ---


def _session(rank: int, world: int) -> Session:
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    return Session(ranks=ranks, device=torch.device("cpu"), timeout=timedelta(seconds=300))


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
