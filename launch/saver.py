"""Checkpoints of a running job: when they are written, what an error means, where to continue."""

import json
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.errors import UserError
from ringattn.launch.checkpoint import load_tensors
from ringattn.launch.checkpoint_choice import (
    Candidate,
    Choice,
    checkpoints_of,
    choose_checkpoints,
    none_left,
    read_run_id,
)
from ringattn.launch.checkpoint_files import find_problems
from ringattn.launch.checkpoint_state import FORMAT_VERSION, CheckpointState
from ringattn.launch.checkpoint_writer import Retention, SaveError, write_checkpoint
from ringattn.launch.engine import Engine
from ringattn.launch.events import EventLog
from ringattn.launch.failure import report_line
from ringattn.launch.initial_weights import WeightsChoice, load_weights, sound_weights
from ringattn.launch.job import Job
from ringattn.launch.peers import Peers
from ringattn.launch.snapshot import Snapshot, own_rows
from ringattn.parallel.host_memory import copies_for
from ringattn.parallel.mesh import TrainMesh
from ringattn.parallel.worker import Worker

_RNG = "rng/cpu"


class Restored(NamedTuple):
    """Where a run goes on: steps done, tokens read by them, what the judge of steps remembers."""

    step: int
    position: int
    guard: list[float]


class Saver:
    """Saves and restores one rank's engine. Every rank calls every method together, but `close`.

    With ``checkpoint.background`` a save copies this rank's rows to host memory and returns; a
    thread writes them over a process group of its own, so that its collectives never meet those of
    the training.

    Args:
        job: the run.
        engine: what is saved and restored.
        mesh: all ranks.
        device: of this rank.
        timeout: how long a rank's thread waits for the others'.
        warn: shows one line on rank 0, such as a failed save of a run that goes on.

    Attributes:
        stored: step of the newest state that is known to be stored, or was restored.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        mesh: TrainMesh,
        device: torch.device,
        timeout: timedelta,
        warn: Callable[[str], None] = report_line,
    ) -> None:
        self._job, self._engine, self._warn = job, engine, warn
        self._settings, self._run_dir = job.config.checkpoint, Path(job.config.run.dir)
        self._own = checkpoints_of(self._run_dir)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        self._peers = Peers(group)
        self._live, self._host = mesh.world_mesh(), mesh.world_mesh("cpu")
        self._snapshot = Snapshot(copies_for(device), self._host)
        self._worker = Worker("ringattn-save")
        self._pending: Future[None] | None = None
        self._damaged: set[str] = set()
        self._run_id: str | None = None
        self._restored, self._step, self.stored = False, 0, 0

    @property
    def failed(self) -> bool:
        """Whether this rank's save under way has failed already; `wait` tells how. Local."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def save(self, step: int, position: int, guard: list[float]) -> None:
        """Saves, after the save under way is done.

        Args:
            step: optimizer steps done. position: tokens of the training stream read by them.
            guard: what the judge of steps remembers.

        Raises:
            UserError: on every rank, with ``checkpoint.on_error=stop``, when the last save or, not
                in the background, this one cannot be written.
        """
        self.wait()
        self._step = step
        assert self._run_id is not None, "restore comes first"
        state = CheckpointState(
            format_version=FORMAT_VERSION,
            step=step,
            position=position,
            guard=guard,
            run_id=self._run_id,
            identity=self._job.identity,
            config=json.loads(json.dumps(asdict(self._job.config))),
            files={},
        )
        # Every random draw of a run is made on the CPU from this generator, alike on all ranks.
        tensors = {**self._engine.tensors(), _RNG: torch.get_rng_state()}
        rows = own_rows(tensors, self._mesh_of)
        if self._settings.background:
            work = partial(self._write, self._snapshot.take(rows), state)
            del tensors, rows
            self._pending = self._worker.submit(work)
            return
        self._pending = Future()
        try:
            self._write(rows, state)
        except Exception as error:
            self._pending.set_exception(error)
        else:
            self._pending.set_result(None)
        if self.failed and self._settings.on_error == "stop":
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Waits for the save under way, if any, on every rank.

        Args:
            last: no other save follows; then a failure is an error whatever the policy.

        Raises:
            UserError: it cannot be written, with ``checkpoint.on_error=stop`` or `last`; with
                "continue" a line says so.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except SaveError as error:
            if self._peers.is_main:
                EventLog(self._run_dir).write("failed save", self._step, str(error))
            if last or self._settings.on_error == "stop":
                raise
            if self._peers.is_main:
                self._warn(f"{error.what}: {error.rule}; training goes on, the next save is tried")
        else:
            self.stored = self._step

    def restore(self) -> Restored:
        """Loads the newest checkpoint that ``checkpoint.resume`` allows and that is sound, or the
        weights to start from. Again, in a running job: the newest of this run, or where it started.

        Checkpoints that are damaged or foreign are named on stderr and passed over.

        Returns:
            What was restored; nothing at a fresh start.

        Raises:
            UserError: there are checkpoints, but none that can be used; or, in a running job, none.
        """
        self.wait()
        again, self._restored = self._restored, True
        choice, weights = self._peers.share(lambda: self._choose(again))
        found = self._load(choice)
        if found is not None:
            self._name_run(found)
            state = found[1]
            self.stored = state.step
            return Restored(state.step, state.position, state.guard)
        if again:
            raise UserError(
                "rollback",
                "there is no checkpoint of this run yet",
                "lower checkpoint.every, so that one comes before a step that goes wrong",
            )
        self._name_run(None)
        if weights is not None:
            path = sound_weights(weights, self._peers, self._warn)
            self._engine.load(partial(load_weights, path))
        return Restored(0, 0, [])

    def close(self, error: BaseException | None = None) -> None:
        """Ends the thread's work; may be called twice.

        Args:
            error: why the run ends early. After a `UserError` the save under way is still finished,
                unless its ranks are gone; after a fault it is abandoned.
        """
        pending, self._pending = self._pending, None
        if pending is not None and (error is None or isinstance(error, UserError)):
            failure = pending.exception()
            if isinstance(failure, SaveError) and self._peers.is_main:
                self._warn(str(failure))

    def _mesh_of(self, device: torch.device) -> DeviceMesh:
        """All ranks, as a mesh of one axis for tensors on a device."""
        return self._host if device.type == "cpu" else self._live

    def _write(self, tensors: dict[str, torch.Tensor], state: CheckpointState) -> None:
        retention = Retention(
            keep=self._settings.keep,
            keep_every=self._settings.keep_every,
            damaged=frozenset(self._damaged),
        )
        path = write_checkpoint(
            self._run_dir, tensors, state, peers=self._peers, retention=retention
        )
        self._damaged.discard(path.name)

    def _choose(self, again: bool) -> tuple[Choice, WeightsChoice | None]:
        """What rank 0 sees: the choice, and the weights of a new run."""
        job = self._job
        if not again:
            return job.choice, job.weights
        choice = choose_checkpoints("auto", self._run_dir, job.identity)
        own = [found for found in choice.candidates if found[1].run_id == self._run_id]
        origin = [found for found in job.choice.candidates if found[0].parent != self._own]
        return Choice((*own, *origin), choice.problems), None

    def _load(self, choice: Choice) -> Candidate | None:
        """Loads the first candidate whose files are sound; None without candidates."""
        problems = list(choice.problems)
        for problem in problems:
            self._report(problem)
        for path, state in choice.candidates:
            found = [
                f"checkpoint {path}: {line}" for line in find_problems(path, state, self._peers)
            ]
            if not found:
                if problems and self._peers.is_main:
                    self._warn(f"checkpoint {path} is used instead")
                self._read(path)
                return path, state
            self._damaged.add(path.name)
            problems += found
            for problem in found:
                self._report(problem)
        if problems:
            raise none_left(tuple(problems))
        return None

    def _read(self, path: Path) -> None:
        rng = torch.get_rng_state()

        def fill(tensors: dict[str, torch.Tensor]) -> None:
            wanted = {**tensors, _RNG: rng}
            load_tensors(path, wanted, peers=self._peers, verified=True)

        self._engine.load(fill)
        torch.set_rng_state(rng)

    def _report(self, problem: str) -> None:
        if self._peers.is_main:
            self._warn(f"{problem}: not used")

    def _name_run(self, found: Candidate | None) -> None:
        """The run of a checkpoint in its own folder, else the one that the folder names, or new."""

        def name() -> str:
            if found is not None and found[0].parent.resolve() == self._own.resolve():
                return found[1].run_id
            kept = None if found is None else read_run_id(self._run_dir)
            return kept or secrets.token_hex(8)

        self._run_id = self._peers.share(name)
