"""Kills a training run at random moments, restarts included, and looks at what is left each time.

    found = Chaos(config, run_dir, reference, ...).run(draw_kills(seed, 5))

Ranks are killed by SIGKILL and restarted by the launcher; a killed job (launcher and all) is
started again by the same command. At every kill the newest complete checkpoint must load and hold,
bit by bit, what the undisturbed run had at that step, and none that was complete may be gone unless
newer ones pushed it out.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ringattn.benchmarks.soak_processes import alive, children, ranks_of
from ringattn.launch.checkpoint import find_checkpoints, read_state
from ringattn.launch.metrics import METRICS_FILE, read_lines
from tests.launch.checkpoints import comparable, stored_tensors
from tests.launch.training import command

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
STALL_S = 120.0  # longest wait without a step for the next kill's moment, or for the end
POLL_S = 0.001
_STEP = re.compile(r"step (\d+)/")


@dataclass(frozen=True)
class Kill:
    """When and whom.

    Attributes:
        aim: "start": while ranks start or resume; "step": between two steps; "save": while a
            checkpoint is written.
        job: the launcher and everything below it; otherwise one rank.
    """

    aim: str
    job: bool = False

    def __str__(self) -> str:
        return f"{'job' if self.job else 'rank'} at {self.aim}"


@dataclass
class Witness:
    """Holds the checkpoints of a disturbed run against those of the undisturbed one.

    Attributes:
        run_dir, reference: folders of the runs; the reference has all of its checkpoints.
        keep: ``checkpoint.keep`` of the disturbed run, at least 1.
        seen: steps of all checkpoints that were complete at some moment.
        at_kill: newest complete step at each kill; None before the first checkpoint.
        partial: kills at which a half-written checkpoint was lying there.
        resumed: first step that each later life printed, where it printed one out of turn.
    """

    run_dir: Path
    reference: Path
    keep: int
    seen: set[int] = field(default_factory=set)
    at_kill: list[int | None] = field(default_factory=list)
    partial: int = 0
    resumed: list[int] = field(default_factory=list)

    def look(self) -> None:
        """After a kill: the newest complete checkpoint loads and is the undisturbed run's."""
        self.partial += self.saves()
        complete = find_checkpoints(self.run_dir)
        self.at_kill.append(_number(complete[-1]) if complete else None)
        if complete:
            newest = complete[-1]
            assert read_state(newest).step == _number(newest)
            like = self.reference / "checkpoints" / newest.name
            assert same_tensors(newest, like), f"{newest.name} is not that of the undisturbed run"
        self.note_complete()

    def note_complete(self) -> None:
        """Remembers what is complete; nothing that was may be lost but to `keep` newer ones."""
        present = {_number(path) for path in find_checkpoints(self.run_dir)}
        for step in self.seen - present:
            newer = [other for other in present if other > step]
            assert len(newer) >= self.keep, f"checkpoint of step {step} is lost; left: {present}"
        self.seen |= present

    def saves(self) -> bool:
        """Whether a checkpoint is being written, or one lies there that a kill left."""
        folder = self.run_dir / "checkpoints"
        return folder.is_dir() and any(folder.glob(".step-*.partial"))


def draw_kills(seed: int, count: int) -> list[Kill]:
    """Kills of a seed: every third at a save, one in four of the whole job."""
    rng = random.Random(seed)
    aims = ["save", "step", "start", "save", "step"]
    return [Kill(aims[i % len(aims)], job=rng.random() < 0.25) for i in range(count)]


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
    direct = children(pid)
    return direct + [below for child in direct for below in descendants(child)]


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits under the same names."""
    first, second = stored_tensors(a), stored_tensors(b)
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


class Chaos:
    """One disturbed run.

    Args:
        config: YAML file of the run. launcher: arguments before ``-m ringattn.launch``.
        arguments: further arguments of ``ringattn train``.
        run_dir, keep, steps, world: as in the config; keep is at least 1.
        reference: run folder of the undisturbed run, with all of its checkpoints.
        log: file that the output goes to.
    """

    def __init__(
        self, config: Path, run_dir: Path, reference: Path, *, steps: int, keep: int, world: int,
        launcher: tuple[str, ...], log: Path, seed: int, arguments: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.config, self.run_dir = config, run_dir
        self.steps, self.world = steps, world
        self.launcher, self.log, self.arguments = launcher, log, arguments
        self.rng, self.found = random.Random(seed), Witness(run_dir, reference, keep)
        self.process = self._start()

    def run(self, kills: list[Kill]) -> Witness:
        """Carries out all kills in turn and waits for the end of the run."""
        try:
            for kill in kills:
                self._wait_for(kill)
                self._carry_out(kill)
                self.found.look()
                if kill.job:
                    self.process = self._start()
            self._until(lambda: self.process.poll() is not None, "the end", ends=True)
            assert self.process.returncode == 0, self._fail(f"exit code {self.process.returncode}")
        finally:
            self._end_job()
        self.found.resumed = self._resumed()
        strange = {step for step in self.found.resumed if step - 1 not in self.found.seen | {0}}
        assert not strange, f"went on at {strange}, not after a checkpoint of {self.found.seen}"
        return self.found

    def _start(self) -> subprocess.Popen[str]:
        return command(
            "train", str(self.config), *self.arguments, launcher=self.launcher, log=self.log
        )

    def _ranks(self) -> list[int]:
        found = ranks_of(self.process.pid)
        return found if len(found) >= self.world else []

    def _wait_for(self, kill: Kill) -> None:
        """Waits until the kill's moment, and then a random while."""
        self._until(lambda: bool(self._ranks()), f"{self.world} ranks")
        if kill.aim == "start":
            return self._linger(5.0)
        target = min(self._step() + self.rng.randint(1, 10), self.steps - 10)
        self._until(lambda: self._step() >= target, f"step {target}")
        if kill.aim == "step":
            return self._linger(0.1)
        self._until(self.found.saves, "a save")
        return self._linger(0.03)

    def _carry_out(self, kill: Kill) -> None:
        if kill.job:
            return self._end_job()
        self._until(lambda: bool(self._ranks()), f"{self.world} ranks")
        os.kill(self.rng.choice(self._ranks()), signal.SIGKILL)

    def _end_job(self) -> None:
        """SIGKILL to the launcher and everything below it, and waits until all are gone."""
        everyone = [self.process.pid, *descendants(self.process.pid)]
        for pid in everyone:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._until(lambda: not any(alive(pid) for pid in everyone), "their end", ends=True)

    def _step(self) -> int:
        lines = read_lines(self.run_dir / METRICS_FILE)
        return lines[-1]["step"] if lines else 0

    def _linger(self, most: float) -> None:
        """A random while of at most so many seconds: the moment of a kill is to be any."""
        end = time.monotonic() + self.rng.uniform(0, most)
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(POLL_S)

    def _until(self, reached: Callable[[], bool], what: str, *, ends: bool = False) -> None:
        """Waits; fails when the run ends before (unless it may) or nothing happens for long."""
        deadline, looked, seen = time.monotonic() + STALL_S, time.monotonic(), self._step()
        while not reached():
            over = self.process.poll() is not None and not ends
            if over or time.monotonic() > deadline:
                why = "the run ended" if over else f"nothing for {STALL_S:g} s"
                raise AssertionError(self._fail(f"{why}, waiting for {what}"))
            if time.monotonic() - looked > 0.05:
                self.found.note_complete()
                looked = time.monotonic()
                if (step := self._step()) != seen:  # a busy machine may take long for many steps
                    deadline, seen = looked + STALL_S, step
            time.sleep(POLL_S)

    def _fail(self, what: str) -> str:
        return f"{what}\n{self.log.read_text(errors='replace')[-4000:]}"

    def _resumed(self) -> list[int]:
        """Steps that were printed out of turn: after the resumption of a run."""
        shown = [int(n) for n in _STEP.findall(self.log.read_text(errors="replace"))]
        return [n for before, n in zip([0, *shown], shown) if n != before + 1]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Every metrics line and the final checkpoint equal those of the undisturbed run."""
    got, want = (comparable(read_lines(f / METRICS_FILE)) for f in (run_dir, reference))
    assert got == want
    last = find_checkpoints(run_dir)[-1]
    assert same_tensors(last, reference / "checkpoints" / last.name), last.name
    leftovers = list((run_dir / "checkpoints").glob(".*"))
    assert not leftovers, leftovers
