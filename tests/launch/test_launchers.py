"""Every launcher's variables, what goes first, and mistakes in them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ringattn.errors import UserError
from ringattn.launch import launchers, mpi
from ringattn.launch.failure import ToldElsewhereError
from ringattn.launch.launchers import Launcher, discover_ranks, discover_ranks_once
from ringattn.launch.main import main
from ringattn.launch.mpi import number_by_node
from ringattn.launch.ranks import Joined, Ranks
from ringattn.launch.slurm import expand_counts, expand_nodes

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host0", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "host0", "MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
    "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8"}


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if mpi4py were not installed."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)


def test_torchrun() -> None:
    environ = dict(TORCHRUN)
    ranks = discover_ranks(environ)
    assert ranks == Ranks(rank=5, world=8, local_rank=1, local_world=4, launcher="torchrun")
    assert environ == TORCHRUN


def test_torchrun_without_local_variables_is_to_be_placed() -> None:
    environ = {key: value for key, value in TORCHRUN.items() if "LOCAL" not in key}
    ranks = discover_ranks(environ)
    assert ranks is not None
    assert (ranks.local_rank, ranks.local_world, ranks.placed) == (5, 8, False)


def test_deepspeed() -> None:
    """LOCAL_RANK is not relied on: it is rank % LOCAL_SIZE, which fails on uneven nodes."""
    ranks = discover_ranks(dict(DEEPSPEED))
    assert ranks == Ranks(
        rank=5, world=8, local_rank=1, local_world=4, launcher="deepspeed", node=1, placed=False
    )


def test_slurm_sets_what_torchrun_would() -> None:
    environ = dict(SLURM)
    ranks = discover_ranks(environ)
    assert ranks == Ranks(rank=5, world=8, local_rank=1, local_world=4, launcher="slurm")
    assert {key: environ[key] for key in TORCHRUN} == TORCHRUN | {
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "20123",
    }  # fmt: skip


def test_slurm_numbers_ranks_node_by_node() -> None:
    """With --distribution=cyclic task 3 of 2 + 3 + 1 tasks is the second one of the first node."""
    cyclic = {
        "SLURM_NTASKS": "6", "SLURM_PROCID": "3", "SLURM_NODEID": "0", "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2,3,1",
    }  # fmt: skip
    ranks = discover_ranks(SLURM | cyclic)
    assert ranks is not None
    assert (ranks.rank, ranks.local_rank, ranks.local_world) == (1, 1, 2)
    last = {"SLURM_PROCID": "5", "SLURM_NODEID": "1", "SLURM_LOCALID": "2"}
    ranks = discover_ranks(SLURM | cyclic | last)
    assert ranks is not None
    assert (ranks.rank, ranks.local_world) == (4, 3)


def test_slurm_keeps_a_given_meeting_point() -> None:
    environ = SLURM | {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "7"}
    discover_ranks(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("elsewhere", "7")


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None},  # a shell of salloc, or a batch script
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # an interactive step
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": None},
    ],
    ids=str,
)
def test_a_shell_of_an_allocation_is_alone(changes: dict[str, str | None]) -> None:
    merged = SLURM | changes
    environ = {key: value for key, value in merged.items() if value is not None}
    before = dict(environ)
    assert discover_ranks(environ) is None
    assert environ == before


def test_no_variables_and_none() -> None:
    assert discover_ranks({}) is None
    assert discover_ranks(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "none") is None
    salloc = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert discover_ranks(salloc, "none") is None
    assert discover_ranks(SLURM | {"SLURM_PTY_PORT": "3"}, "none") is None
    assert discover_ranks({"WORLD_SIZE": "2"}, "none") is None


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, OPEN_MPI, PMI, SLURM, SLURM | PMI])
def test_each_of_several_processes_starts_no_job_of_its_own(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match="a job of its own"):
        discover_ranks(dict(environ), "none")


def _tells(environ: dict[str, str], launcher: Launcher = "auto") -> bool:
    """Whether a process with these variables is the one that tells of its mistake."""
    try:
        discover_ranks_once(dict(environ), launcher)
    except UserError:
        return True
    except ToldElsewhereError:
        return False
    raise AssertionError("it made no mistake")


@pytest.mark.usefixtures("no_mpi")
def test_one_process_of_a_host_tells_of_a_mistake() -> None:
    no_port = {key: value for key, value in TORCHRUN.items() if key != "MASTER_PORT"}
    assert _tells(no_port | {"RANK": "0", "LOCAL_RANK": "0"})
    assert _tells(no_port | {"RANK": "4", "LOCAL_RANK": "0"})  # of another host, which may differ
    assert not _tells(no_port)
    no_local = {key: value for key, value in no_port.items() if not key.startswith("LOCAL")}
    assert not _tells(no_local)
    assert [_tells({"PMI_RANK": rank, "PMI_SIZE": "2"}) for rank in "01"] == [True, False]
    assert [_tells({"PMI_RANK": rank, "PMI_SIZE": "2"}, "none") for rank in "01"] == [True, False]
    assert not _tells(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,3"})
    # What may be wrong with one process alone is told by it.
    assert _tells(TORCHRUN | {"RANK": "9"})
    assert _tells(TORCHRUN | {"LOCAL_RANK": "4"})
    assert _tells(SLURM | {"SLURM_NODEID": "2"})


def test_an_mpi_of_one_process_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, ``--launcher mpi`` would make every process a job of its own."""
    single = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))
    monkeypatch.setattr(mpi, "_load", lambda: single)
    with pytest.raises(UserError, match="did not start this process"):
        discover_ranks(dict(TORCHRUN), "mpi")


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE, then MPI, then the SLURM step."""
    found = Ranks(rank=1, world=8, local_rank=1, local_world=8, launcher="mpi")
    joined = Joined(found, master=("here", 5))
    monkeypatch.setattr(
        launchers, "join_mpi", lambda environ: joined if "PMI_RANK" in environ else None
    )

    def launcher(environ: dict[str, str], name: Launcher = "auto") -> str:
        ranks = discover_ranks(dict(environ), name)
        assert ranks is not None
        return ranks.launcher

    assert launcher(TORCHRUN | PMI | SLURM) == "torchrun"
    assert launcher(DEEPSPEED | PMI | SLURM) == "deepspeed"
    assert launcher(PMI | SLURM) == "mpi"
    assert launcher(SLURM) == "slurm"
    assert launcher(TORCHRUN | PMI | SLURM, "slurm") == "slurm"
    assert launcher(DEEPSPEED, "torchrun") == "torchrun"
    environ = PMI | SLURM
    discover_ranks(environ)
    assert (environ["RANK"], environ["LOCAL_WORLD_SIZE"]) == ("1", "8")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("here", "5")


@pytest.mark.usefixtures("no_mpi")
def test_variables_of_mpi_that_srun_set_do_not_need_mpi() -> None:
    ranks = discover_ranks(SLURM | PMI)
    assert ranks is not None
    assert ranks.launcher == "slurm"
    with pytest.raises(UserError, match="mpi4py"):
        discover_ranks(SLURM | {"PMI_RANK": "2", "PMI_SIZE": "8"})  # mpiexec inside a step
    ranks = discover_ranks(SLURM | {"PMIX_RANK": "5"})
    assert ranks is not None
    assert ranks.launcher == "slurm"


MISTAKES: dict[str, tuple[dict[str, str], Launcher, str]] = {
    "rank without world": ({"RANK": "0"}, "auto", "WORLD_SIZE"),
    "world without rank": ({"WORLD_SIZE": "2"}, "auto", "RANK"),
    "local rank too high": (TORCHRUN | {"LOCAL_RANK": "4"}, "auto", "LOCAL_RANK=4"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, "auto", "MASTER_PORT"),
    "Open MPI without size": ({"OMPI_COMM_WORLD_RANK": "0"}, "auto", "OMPI_COMM_WORLD_SIZE"),
    "PMI without rank": ({"PMI_SIZE": "2"}, "auto", "PMI_RANK"),
    "PMI rank too high": ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "auto", "PMI_RANK=2"),
    "no mpi4py": (OPEN_MPI, "auto", "ringattn[mpi]"),
    "no mpi4py under PMI": (PMI, "auto", "needs the package mpi4py"),
    "no mpi4py, mpi wanted": ({}, "mpi", "needs the package mpi4py"),
    "torchrun wanted": ({}, "torchrun", "none of its variables"),
    "slurm wanted": ({"SLURM_NTASKS": "4"}, "slurm", "--launcher slurm"),
    "no task number": (
        {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "auto", "SLURM_PROCID"
    ),
    "task number too high": (SLURM | {"SLURM_PROCID": "8"}, "auto", "SLURM_PROCID=8"),
    "tasks do not add up": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,3"}, "auto", "add up to the step's 8"
    ),
    "tasks that are none": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(2)"}, "auto", "SLURM_STEP_TASKS_PER_NODE=4(2)"
    ),
    "no such node": (SLURM | {"SLURM_NODEID": "2"}, "auto", "SLURM_NODEID=2"),
    "no such place": (SLURM | {"SLURM_LOCALID": "4"}, "auto", "SLURM_LOCALID=4"),
    "a broken node list": (SLURM | {"SLURM_STEP_NODELIST": "gpu[1-"}, "auto", "gpu[1-"),
    "no job": ({k: v for k, v in SLURM.items() if k != "SLURM_JOB_ID"}, "auto", "SLURM_JOB_ID"),
}  # fmt: skip


@pytest.mark.usefixtures("no_mpi")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    environ, launcher, words = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        discover_ranks(dict(environ), launcher)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, names",
    [
        ("x", ["x"]),
        ("gpu[01-03,7],x", ["gpu01", "gpu02", "gpu03", "gpu7", "x"]),
        ("a,b-2,c[9-11]", ["a", "b-2", "c9", "c10", "c11"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("n[1,3]-ib.cluster", ["n1-ib.cluster", "n3-ib.cluster"]),
        ("n[0998-1001]", ["n0998", "n0999", "n1000", "n1001"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    "text", ["", "a[", "a]", "a[]", "a[3-1]", "a[x]", "a[1-]", "a,,b", "a[[1]]"]
)
def test_broken_node_lists(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_nodes(text)


def test_task_counts() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]


def test_mpi_ranks_are_numbered_node_by_node() -> None:
    """mpiexec may deal its ranks out to nodes in turn."""
    homes = [(0, "a"), (1, "b"), (0, "a"), (1, "b"), (1, "b")]
    assert [number_by_node(homes, rank) for rank in range(5)] == [
        (0, 0, 2), (2, 0, 3), (1, 1, 2), (3, 1, 3), (4, 2, 3),
    ]  # fmt: skip


def test_deepspeed_hands_over_a_local_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--local_rank=1", "train", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capfd.readouterr().err


@pytest.mark.parametrize("command_line", [["train", "demo"], ["evaluate", "run"]])
def test_an_unknown_launcher(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command_line, "--launcher", "pdsh"])
    assert "invalid choice: 'pdsh'" in capsys.readouterr().err
