"""Checkpoints for tests: written by this process alone, and damaged in every way."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ringattn.launch.checkpoint_state import FORMAT_VERSION, CheckpointState
from ringattn.launch.checkpoint_writer import Retention, write_checkpoint
from ringattn.launch.peers import ALONE

IDENTITY = {"seed": 1}


def state_of(step: int, run_id: str = "a", **changes: Any) -> CheckpointState:
    """A description for `save`."""
    values = {"step": step, "position": step, "run_id": run_id, "identity": IDENTITY} | changes
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
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))
