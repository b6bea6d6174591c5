"""The watch over ranks: whatever one of them does, all end in time, with one report."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from ringattn.errors import UserError
from ringattn.launch.events import EVENTS_FILE
from ringattn.launch.failure import run_reporting
from ringattn.launch.metrics import read_lines
from ringattn.launch.monitor import Monitor
from ringattn.launch.ranks import Ranks
from ringattn.launch.stacks import group_stacks, name_ranks
from ringattn.launch.whereabouts import Whereabouts
from ringattn.parallel.processes import exit_with_parent
from ringattn.place import Place
from tests.ranks import PRELOADED

TIMEOUT_S, LATEST_S, WORLD = 2.0, 12.0, 3


def _work(where: Whereabouts, until: Callable[[], bool] = lambda: False) -> None:
    """What a healthy rank does: it gets on."""
    step = 0
    while not until():
        step += 1
        where.enter("training", step, watched=True)
        where.places[0].at("forward", 2, 5)
        time.sleep(0.01)


def _raise(where: Whereabouts) -> None:
    where.enter("training", 7)
    where.places[0].at("backward", 3, 4)
    raise RuntimeError("a kernel broke")


def _mistake(where: Whereabouts) -> None:
    where.enter("training", 7)
    raise UserError("data", "is not there", "prepare it")


def _freeze(where: Whereabouts) -> None:
    where.enter("training", 7)
    time.sleep(0.5)  # so that the other ranks have seen it alive at that step
    os.kill(os.getpid(), signal.SIGSTOP)


def _stand(where: Whereabouts) -> None:
    where.enter("training", 7, watched=True)
    threading.Event().wait()


def _finish(where: Whereabouts) -> None:
    where.enter("training", 7)


BODIES: dict[str, Callable[[Whereabouts], None]] = {
    "work": _work,
    "raise": _raise,
    "mistake": _mistake,
    "freeze": _freeze,
    "stand": _stand,
    "finish": _finish,
}


def _rank(rank: int, port: int, body: str, stderr: str, run_dir: str, keeper: int | None) -> None:
    """One watched rank."""
    exit_with_parent()
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    where = Whereabouts(places=[Place()])
    ranks = Ranks(rank=rank, world=WORLD)
    monitor = Monitor(ranks, store, TIMEOUT_S, where, Path(run_dir), keeper)

    def watched() -> None:
        with monitor:
            BODIES[body](where)

    os._exit(run_reporting(watched, monitor.report))


class Watched:
    """Ranks under their monitors, one body each, and the store that they share."""

    def __init__(self, folder: Path, *bodies: str, keeper: int | None = None) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        self._folder = folder
        self.store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        self.processes = [
            context.Process(
                target=_rank,
                args=(rank, port, body, str(folder / str(rank)), str(folder), keeper),
            )
            for rank, body in enumerate(bodies)
        ]
        for process in self.processes:
            process.start()

    def codes(self, ranks: list[int]) -> list[int | None]:
        """Exit codes of ranks, which must end in time; the others are killed."""
        end = time.monotonic() + TIMEOUT_S + LATEST_S
        for rank in ranks:
            self.processes[rank].join(max(0.0, end - time.monotonic()))
        codes = [self.processes[rank].exitcode for rank in ranks]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def reports(self) -> list[str]:
        """What each rank printed."""
        return [(self._folder / str(rank)).read_text() for rank in range(WORLD)]


def test_a_fault_is_reported_once_with_all_stacks(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "work", "raise", "work")
    assert ranks.codes([0, 1, 2]) == [1, 1, 1]
    before, report, after = ranks.reports()
    assert (before, after) == ("", "")
    assert re.search(
        r"^ringattn: rank 1 on host \S+ \(pid \d+\) at step 7, training, backward plan step 3 "
        r"move 4: RuntimeError: a kernel broke$",
        report,
        re.M,
    )
    assert "in _raise" in report
    assert "in _work" in report
    assert "stack of rank 1:" in report
    (kept,) = (tmp_path / "failures").iterdir()
    assert kept.read_text() == report.lstrip("\n")
    (event,) = read_lines(tmp_path / EVENTS_FILE)
    assert (event["event"], event["step"], event["rank"]) == ("failure", 7, 1)


def test_a_mistake_is_one_line_and_exit_code_2_everywhere(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "work", "work", "mistake")
    assert ranks.codes([0, 1, 2]) == [2, 2, 2]
    assert [r.strip() for r in ranks.reports()] == [
        "",
        "",
        "ringattn: data: is not there; prepare it",
    ]


def test_a_rank_that_freezes_is_named_with_its_last_step(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "work", "work", "freeze")
    assert ranks.codes([0, 1]) == [1, 1]
    reports = [report for report in ranks.reports() if report]
    assert len(reports) == 1
    assert re.search(
        r"^ringattn: .*rank 2 on host \S+ .* step 7, .*no sign of life", reports[0], re.M
    )
    assert re.search(
        r"^ringattn: rank 2 on .* at step 7, training did not answer", reports[0], re.M
    )


def test_a_standstill_is_a_failure(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "stand", "work", "work")
    assert ranks.codes([0, 1, 2]) == [1, 1, 1]
    report = "".join(ranks.reports())
    assert re.search(r"^ringattn: rank 0 .* step 7, training: no progress for 2 s", report, re.M)
    assert "in _stand" in report


def test_ranks_without_a_store_end_by_themselves(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "work", "work", "work")
    while not ranks.store.check([f"ringattn/beat/{rank}" for rank in range(WORLD)]):
        time.sleep(0.01)
    ranks.store = None  # ends the server
    assert ranks.codes([0, 1, 2]) == [1, 1, 1]
    for rank, report in enumerate(ranks.reports()):
        assert re.search(rf"^ringattn: rank {rank} .* step \d+, .*store has not", report, re.M)


def test_a_rank_that_is_gone_with_the_store_is_named(tmp_path: Path) -> None:
    """Under MPI and SLURM the store is rank 0's: nobody can be asked who is silent."""
    ranks = Watched(tmp_path, "work", "work", "work", keeper=0)
    keys = [f"ringattn/beat/{rank}" for rank in range(WORLD)]
    ranks.store.wait(keys)

    def counts() -> list[int]:
        return [json.loads(text)["count"] for text in ranks.store.multi_get(keys)]

    begun = counts()  # rank 0 has shown itself; two beats later a rank has seen it
    while any(now < before + 2 for now, before in zip(counts(), begun, strict=True)):
        time.sleep(0.01)
    ranks.store = None  # ends the server
    assert ranks.codes([0, 1, 2]) == [1, 1, 1]
    named = [
        bool(re.search(r"^ringattn: rank 0 on .* at .* did not answer", report, re.M))
        for report in ranks.reports()
    ]
    assert named == [False, True, True]


def test_ranks_that_finish_in_order_are_no_failure(tmp_path: Path) -> None:
    ranks = Watched(tmp_path, "finish", "finish", "finish")
    assert ranks.codes([0, 1, 2]) == [0, 0, 0]
    assert ranks.reports() == ["", "", ""]


def test_one_rank_that_is_done_is_not_missed(tmp_path: Path) -> None:
    """Its neighbour hears no more of it, and must not take that for silence."""
    ranks = Watched(tmp_path, "work", "finish", "work")
    ranks.processes[1].join(LATEST_S)
    assert ranks.processes[1].exitcode == 0
    ranks.processes[0].join(2 * TIMEOUT_S + 1)  # longer than silence is borne
    assert [ranks.processes[rank].exitcode for rank in (0, 2)] == [None, None]
    ranks.codes([])


def test_names_of_ranks_and_groups_of_stacks() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([7, 0, 1, 2]) == "ranks 0-2, 7"
    text = group_stacks({0: "a", 1: "b", 2: "a"})
    assert text == "stack of ranks 0, 2:\na\nstack of rank 1:\nb"
