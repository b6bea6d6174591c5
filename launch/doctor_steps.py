"""The steps of ``ringattn doctor``: what ranks run on, links, rates, methods.

What a step finds is shared over the job's store, so that all ranks know the same and stop together;
a rank that does not answer is named.
"""

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn.launch import doctor_host, doctor_methods
from ringattn.launch.doctor_board import Board, SilentRanksError
from ringattn.launch.doctor_cluster import Measured, cluster_text
from ringattn.launch.doctor_curve import CurveWork, measure_curve
from ringattn.launch.doctor_executor import ExecutorWork, measure_executor
from ringattn.launch.doctor_links import (
    Round,
    link_rounds,
    meet,
    merge_round,
    reduce_all,
    sizes_for,
)
from ringattn.launch.doctor_methods import CellResult, Trial, cells_for, merge_cell, tell_cell
from ringattn.launch.doctor_rates import measure_rates, name_slow, work_for
from ringattn.launch.doctor_report import Progress, Report, as_json
from ringattn.launch.doctor_wait import call_within, finish
from ringattn.launch.launchers import Launcher
from ringattn.launch.session import Session
from ringattn.schedule import Lane

_CLASSES = tuple((int(lane), long) for lane in Lane for long in (False, True))
_SLOW_PAIR = 0.5  # of its lane's median bandwidth


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        ranks: to start where no launcher did; None for one per GPU, or 2 without any.
        launcher: as in `ringattn.launch.launchers.discover_ranks`.
        device: as ``run.device``. timeout: seconds that a step may take.
        quick: fewer masks and shorter measurements.
        json_file, out: files for the report and for the planner's cluster.
    """

    ranks: int | None = None
    launcher: Launcher = "auto"
    device: str = "auto"
    timeout: float = 60.0
    quick: bool = False
    json_file: str | None = None
    out: str | None = None


class Examination:
    """The steps of one rank. Each returns whether later ones make sense.

    Args:
        request: equal on all ranks. session: of this rank, in the default group of all.
        board: opened on all ranks.
    """

    def __init__(self, request: Request, session: Session, board: Board) -> None:
        self.request, self.session, self.board = request, session, board
        self.device, self.rank, self.world = session.device, session.ranks.rank, board.world
        self.staged = "cuda" if session.shared else None
        self.report = Report(node=doctor_host.node_size(session))
        self.progress = Progress(session.is_main)
        self.work = work_for(self.device, request.quick)

    @cached_property
    def _trial(self) -> Trial:
        """The one context of links and methods."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float64
        tokens = doctor_methods.tokens_for(self.world, self.device)
        masks = doctor_methods.mask_set(tokens, self.request.quick)
        return Trial(self.world, self.device, dtype, masks, self.staged, self.request.timeout)

    def run(self) -> Report:
        """All steps. Every rank calls it; all that answer return equal findings.

        Raises:
            CommunicationError: rank 0 did not answer.
        """
        try:
            for name, part in self._parts():
                start = time.monotonic()
                going_on = part()
                self.report.seconds[name] = time.monotonic() - start
                if not going_on:
                    self.report.broken = True
                    self.report.notes.append(f"nothing more was tried after {name} failed")
                    break
        except SilentRanksError as error:
            self.report.broken = True
            self._tell_silent(error)
        self.progress.close()
        self.session.where.enter("doctor: reporting")
        return self.report

    def _parts(self) -> list[tuple[str, Callable[[], bool]]]:
        return [
            ("ranks", self._ranks),
            ("links", self._links),
            ("rates", self._rates),
            ("executor", self._executor),
            ("methods", self._methods),
        ]

    def _attempt(self, step: str, call: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of all ranks to a call; {"error": …} from one that raised."""
        self.session.where.enter(f"doctor: {step}", watched=True)
        try:
            mine = call()
        except Exception as error:
            mine = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        return self.board.share(step, mine)

    def _ranks(self) -> bool:
        """Versions, devices, hosts."""
        self.progress.show("ranks", 0, 1)
        answers = self._attempt("ranks", lambda: doctor_host.describe_rank(self.session))
        if self._failed("describing itself", answers):
            return False
        self.report.facts = answers
        self.report.wrong += doctor_host.compare_ranks(answers)
        self.report.notes += doctor_host.uneven_hosts(answers)
        return True

    def _links(self) -> bool:
        """Every pair, then all ranks together."""
        if self.world == 1:
            return True
        opened = self._attempt("opening links", self._open)
        if self._failed("opening links", opened):
            return False
        rounds = link_rounds(self.world, self.report.node)
        for number, found in enumerate(rounds):
            self.progress.show("links", number, len(rounds))
            answers = self._attempt(f"links {number}", lambda f=found: self._meet(f))
            pairs = merge_round(found, answers)
            self.report.pairs += pairs
            self.report.wrong += [
                f"ranks {pair.ranks[0]} and {pair.ranks[1]}: {pair.error or pair.wrong}"
                for pair in pairs
                if pair.error or pair.wrong
            ]
            if any(pair.error for pair in pairs):
                return False
        self._judge_speed()
        return self._reduce()

    def _open(self) -> dict[str, Any]:
        """Opens what links and methods will use; on NCCL communicators, which may block."""
        fabric = self._trial.context.fabric(self.device)
        seconds = self.request.timeout

        def open_all() -> None:
            fabric.open(_CLASSES)
            finish(self.device, time.monotonic() + seconds)

        call_within(seconds, self.device, open_all)
        return {}

    def _meet(self, found: Round) -> dict[str, Any]:
        peer = found.peer_of(self.rank)
        if peer is None:
            return {}
        direct = self.device.type == "cuda" and self.staged is None
        sizes = sizes_for(direct, self.request.quick)
        fabric = self._trial.context.fabric(self.device)
        return meet(fabric, peer, self.device, sizes, found.lane, self.request.timeout)

    def _judge_speed(self) -> None:
        for lane, pairs in self.report.lanes().items():
            middle = statistics.median(p.gbs for p in pairs)
            lines = [
                f"ranks {p.ranks[0]} and {p.ranks[1]} ({lane}-node): {p.gbs:.3g} GB/s, the median "
                f"is {middle:.3g}"
                for p in pairs
                if p.gbs < _SLOW_PAIR * middle
            ]
            self._slow(lines)

    def _slow(self, lines: list[str]) -> None:
        """Slow is wrong on GPUs; on a CPU other processes may be in the way."""
        gpu = self.device.type == "cuda" and not self.session.shared
        (self.report.wrong if gpu else self.report.notes).extend(lines)

    def _reduce(self) -> bool:
        group = dist.group.WORLD
        assert group is not None
        direct = self.device.type == "cuda" and self.staged is None
        device = self.device if direct else torch.device("cpu")
        nbytes = sizes_for(direct, self.request.quick).nbytes
        answers = self._attempt(
            "all-reduce", lambda: reduce_all(group, device, nbytes, self.request.timeout)
        )
        if self._failed("all-reduce", answers):
            return False
        self.report.reduce = answers
        self.report.wrong += [
            f"all-reduce on rank {rank}: {mine['wrong']}"
            for rank, mine in enumerate(answers)
            if mine["wrong"]
        ]
        return True

    def _rates(self) -> bool:
        """What every rank computes and copies."""
        self.progress.show("rates", 0, 1)
        answers = self._attempt(
            "rates",
            lambda: measure_rates(self.device, self.work, self.staged, self.request.timeout),
        )
        if self._failed("measuring rates", answers):
            return False
        self.report.rates = answers
        self._slow(name_slow(answers, [mine["host"]["name"] for mine in self.report.facts]))
        return True

    def _executor(self) -> bool:
        """What a cluster file of ranks on CPU cores needs beside rates."""
        wanted = self.request.out and not self.request.quick
        if self.device.type != "cpu" or not wanted:
            return True
        seconds = min(15.0, self.request.timeout / 6)
        curve, executor = CurveWork(seconds=seconds), ExecutorWork(passes=3 if seconds < 10 else 5)
        parts = (
            ("kernel curve", lambda: measure_curve(curve)),
            ("executor", lambda: measure_executor(executor, self.world, self.rank)),
        )
        for number, (step, call) in enumerate(parts):
            self.progress.show("executor", number, 2)
            answers = self._attempt(step, call)
            if self._failed(f"measuring the {step}", answers):
                return False
            self.report.timed[step] = answers
        return True

    def _methods(self) -> bool:
        """Every method on every mask."""
        trial = self._trial
        cells = cells_for(list(trial.masks), self.world, self.report.node)
        for number, (method, mine) in enumerate(cells.items()):
            self.progress.show("methods", number, len(cells))
            found = self._attempt(f"method {method}", lambda m=mine: _run_cells(trial, m))
            if self._failed(f"method {method}", found):
                return False
            for index, cell in enumerate(mine):
                got = [CellResult(**answer["cells"][index]) for answer in found]
                merged = merge_cell(got)
                name = cell.named(self.report.node)
                self.report.cells[name] = merged
                self._judge_cell(name, merged)
                if merged.status == "failed":
                    return False
        return True

    def _judge_cell(self, name: str, found: CellResult) -> None:
        line = tell_cell(name, found, doctor_methods.TOLERANCE[self._trial.dtype])
        if line is None:
            return
        # Some GPU kernels add gradients in whatever order blocks finish.
        only_bits = found.status == "ok" and self.device.type == "cuda"
        (self.report.notes if only_bits else self.report.wrong).append(line)

    def _failed(self, what: str, answers: list[dict[str, Any]]) -> bool:
        """Whether any rank could not do it; then says which."""
        errors = [f"rank {r}: {what}: {a['error']}" for r, a in enumerate(answers) if "error" in a]
        self.report.wrong += errors
        return bool(errors)

    def _tell_silent(self, error: SilentRanksError) -> None:
        """Names ranks that did not answer."""
        for rank in error.ranks:
            facts = self.report.facts[rank] if self.report.facts else None
            host = f" (host {facts['host']['name']})" if facts else ""
            self.report.wrong.append(
                f"rank {rank}{host} did not answer within {self.request.timeout:g} s in step "
                f"{error.step}"
            )

    def write(self) -> None:
        """The files that were asked for. A cluster is written where rates are known."""
        report, request = self.report, self.request
        if request.json_file:
            Path(request.json_file).write_text(json.dumps(as_json(report), indent=1) + "\n")
        if request.out and report.rates and not report.wrong:
            measured = Measured(
                facts=report.facts,
                node=report.node,
                links=report.medians(),
                rates=report.rates,
                work=self.work,
                timed=report.timed,
            )
            text = cluster_text(measured, datetime.date.today())
            Path(request.out).write_text(text, encoding="utf-8")
        elif request.out:
            report.notes.append(f"{request.out} was not written: figures are missing or wrong")


def _run_cells(trial: Trial, cells: list[doctor_methods.Cell]) -> dict[str, Any]:
    """Results of cells on this rank; after a failure the others are not begun."""
    results: list[CellResult] = []
    for cell in cells:
        broken = results and results[-1].status == "failed"
        results.append(
            CellResult(status="failed", message="not begun", silent=True, rank=trial.context.rank)
            if broken
            else trial.run(cell)
        )
    return {"cells": [asdict(result) for result in results]}
