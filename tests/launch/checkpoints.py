"""Checkpoints for tests: written by this process alone, and damaged in every way."""

import contextlib
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import load_tensors
from ringattn.launch.checkpoint_choice import choose_checkpoints
from ringattn.launch.checkpoint_files import find_problems
from ringattn.launch.checkpoint_reader import SafeReader
from ringattn.launch.checkpoint_state import (
    FORMAT_VERSION,
    STATE_FILE,
    CheckpointState,
    FileSum,
    encode_state,
    read_state,
)
from ringattn.launch.checkpoint_writer import Retention, write_checkpoint
from ringattn.launch.config_load import config_from_values
from ringattn.launch.job import open_job
from ringattn.launch.peers import ALONE
from ringattn.launch.ranks import Ranks
from ringattn.launch.session import Session
from ringattn.launch.trainer import Trainer
from tests.ranks import run_ranks

IDENTITY = {"seed": 1}


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    entries: dict[str, Any] = SafeReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(e.size, dtype=e.properties.dtype) for k, e in entries.items()}
    load_tensors(checkpoint, tensors, alone=True)
    return tensors


def comparable(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal bit by bit: everything but times."""
    return [tuple(line[k] for k in ("step", "loss", "tokens", "grad_norm", "lr")) for line in lines]


def state_of(step: int, run_id: str = "a", **changes: Any) -> CheckpointState:
    """A description for `save`."""
    values = {"step": step, "position": step, "run_id": run_id, "identity": IDENTITY}
    values |= {"guard": [0.0]} | changes
    return CheckpointState(format_version=FORMAT_VERSION, config={}, files={}, **values)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Two tensors that only this step holds."""
    return {
        "model/a": torch.arange(6000.0).view(20, 300) + step,
        "optimizer/a/step": torch.tensor(float(step)),
    }


def save(
    run_dir: Path,
    step: int = 4,
    *,
    run_id: str = "a",
    retention: Retention | None = None,
    identity: dict[str, Any] | None = None,
) -> Path:
    """Writes one checkpoint without other ranks."""
    state = state_of(step, run_id, identity=identity or IDENTITY)
    retention = retention or Retention(keep=0)
    return write_checkpoint(run_dir, tensors_of(step), state, peers=ALONE, retention=retention)


Damage = Callable[[Path, random.Random], str]  # spoils a checkpoint, returns the file's name


def _pick(path: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path.iterdir()))


def truncate(path: Path, draw: random.Random) -> str:
    """Cuts a file at a random byte."""
    file = _pick(path, draw)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])
    return file.name


def flip(path: Path, draw: random.Random) -> str:
    """Flips one bit of a file."""
    file = _pick(path, draw)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return file.name


def remove(path: Path, draw: random.Random) -> str:
    """Removes a file."""
    file = _pick(path, draw)
    file.unlink()
    return file.name


def swap(path: Path, draw: random.Random) -> str:
    """Puts another checkpoint's file in the place of its own."""
    file = _pick(path, draw)
    others = sorted(other for other in path.parent.glob("step-*") if other != path)
    shutil.copyfile(draw.choice(others) / file.name, file)
    return file.name


def add(path: Path, draw: random.Random) -> str:
    """Adds a file of another checkpoint."""
    name = f"__{draw.randrange(10, 99)}_0.distcp"
    (path / name).write_bytes(draw.randbytes(100))
    return name


DAMAGES: dict[str, Damage] = {
    "truncated": truncate, "bit flipped": flip, "missing": remove, "of another": swap, "extra": add,
}  # fmt: skip


def rewrite_state(path: Path, **changes: Any) -> None:
    """Changes state.json without a thought for its checksum."""
    state = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps(state | changes))


def reseal(path: Path) -> None:
    """Makes the sums of all files right again, as one who means harm would."""
    names = [file.name for file in path.iterdir() if file.name != STATE_FILE]
    files = {name: _sum((path / name).read_bytes()) for name in names}
    state = replace(read_state(path), files=files)
    (path / STATE_FILE).write_text(encode_state(state))


def _sum(content: bytes) -> FileSum:
    return FileSum(len(content), hashlib.sha256(content).hexdigest())


def problems_of(path: Path) -> list[str]:
    """What is wrong with a checkpoint, as a run that resumes sees it, without starting ranks."""
    try:
        choice = choose_checkpoints(str(path), path, IDENTITY)
    except UserError as error:
        return [str(error)]
    return find_problems(*choice.candidates[0], ALONE)


def sound_checkpoints(run_dir: Path) -> list[Path]:
    """Those that a run may continue from, newest first."""
    choice = choose_checkpoints("auto", run_dir, IDENTITY)
    return [path for path, state in choice.candidates if not find_problems(path, state, ALONE)]


def train_outcomes(
    values: dict[str, Any], patch: Callable[[], Any] | None = None
) -> list[tuple[str | None, str]]:
    """Trains on pooled ranks; returns each rank's `UserError`, if any, and what it said on stderr.

    `patch` makes a context in which every rank trains.
    """
    config = config_from_values(values)
    return run_ranks(config.world, _outcome, values, patch)


def _outcome(
    rank: int, world: int, _group: Any, values: dict[str, Any], patch: Callable[[], Any] | None
) -> tuple[str | None, str]:
    config, said = config_from_values(values), io.StringIO()
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    timeout = timedelta(seconds=config.run.timeout_s)
    session = Session(ranks=ranks, device=torch.device("cpu"), timeout=timeout)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(said))
        if patch is not None:
            stack.enter_context(patch())
        try:
            Trainer(open_job(config, world), session).fit()
        except UserError as error:
            return str(error), said.getvalue()
    return None, said.getvalue()
