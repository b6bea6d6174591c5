"""Checkpoints of a run: one folder per saved step, whole or not there at all.

    RUN/checkpoints/step-000123/
        .metadata, __R_N.distcp    tensors, written by `torch.distributed.checkpoint`
        state.json                 `CheckpointState`; written last

A folder is written under a hidden name and renamed when complete. Tensors are stored under names
and shapes that do not depend on dp or cp, so that any number of ranks can read them.
"""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ringattn.errors import UserError
from ringattn.launch.checkpoint_reader import SafeReader

FORMAT_VERSION = 2
_STEP = re.compile(r"step-(\d{6,})")
_ANEW = "train anew with checkpoint.resume=never, or in another run.dir"


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint says about itself.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        step: optimizer steps done.
        position: tokens of the training stream read by them.
        identity: dotted keys and values that a run must share to continue from here: the seed,
            the model's shape, the data.
        config: the writer's whole configuration, for people.
    """

    format_version: int
    step: int
    position: int
    identity: dict[str, Any]
    config: dict[str, Any]


def find_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest step first."""
    root = Path(run_dir) / "checkpoints"
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP.fullmatch(path.name)]
    complete = [path for path in found if (path / "state.json").is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def choose_checkpoint(resume: str, run_dir: str | Path) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means; None to start from step 0.

    Args:
        resume: "auto", "never", or the path of a checkpoint or of a run with checkpoints.
        run_dir: the run's own folder.

    Raises:
        UserError: a path that holds no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(find_checkpoints(run_dir)), None)
    if (Path(resume) / "state.json").is_file():
        return Path(resume)
    found = find_checkpoints(resume)
    if not found:
        raise UserError(
            f"checkpoint.resume={resume}",
            "must be auto, never, or the path of a complete checkpoint",
            f"name a step-… folder below {Path(run_dir) / 'checkpoints'}",
        )
    return found[-1]


def read_state(path: Path) -> CheckpointState:
    """Reads state.json of a checkpoint.

    Raises:
        UserError: it is missing, broken or of another version.
    """
    file = path / "state.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {file}: format_version={version}",
                f"this program reads {FORMAT_VERSION}",
                _ANEW,
            )
        state = CheckpointState(**{f.name: raw[f.name] for f in fields(CheckpointState)})
        counts = (state.step, state.position)
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError("step and position must be counts")
        dict(state.identity)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"checkpoint {file}", f"is no checkpoint description ({reason})", _ANEW
        ) from None
    return state


def check_identity(path: Path, state: CheckpointState, identity: dict[str, Any]) -> None:
    """Refuses to continue a run of another model, seed or data.

    Raises:
        UserError: naming the first key that differs.
    """
    for key in sorted(identity.keys() | state.identity.keys()):
        ours, theirs = identity.get(key), state.identity.get(key)
        if ours != theirs:
            raise UserError(
                f"{key}={ours}",
                f"must be {theirs} to continue from checkpoint {path}",
                f"set it back, or {_ANEW}",
            )


def save_checkpoint(
    run_dir: str | Path,
    tensors: dict[str, torch.Tensor],
    state: CheckpointState,
    *,
    is_main: bool,
    barrier: Callable[[], None],
    keep: int,
) -> Path:
    """Writes one checkpoint; every rank calls it with equal replicated tensors.

    Args:
        run_dir: the run's folder, shared by all ranks.
        tensors: by name; each is written once, by one of the ranks that hold it.
        state: goes to state.json.
        is_main: this rank creates, renames and removes folders.
        barrier: waits for all ranks.
        keep: newest checkpoints to keep, 0 for all.

    Returns:
        The complete folder.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    final = Path(run_dir) / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        if is_main:
            final.parent.mkdir(parents=True, exist_ok=True)
            for leftover in final.parent.glob(".step-*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()
        barrier()
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, overwrite=False))
        if is_main:
            _publish(partial, final, json.dumps(asdict(state), indent=1) + "\n")
            if keep:
                # Later steps are of a run that this one left at an earlier checkpoint.
                found = [p for p in find_checkpoints(run_dir) if p.name <= final.name]
                for old in found[:-keep]:
                    shutil.rmtree(old)
    except (OSError, CheckpointException) as error:
        raise _cannot_write(final, error) from error
    barrier()
    return final


def load_tensors(path: Path, tensors: dict[str, torch.Tensor], *, alone: bool = False) -> None:
    """Fills `tensors` in place from a checkpoint. Every rank calls it, unless `alone`.

    Args:
        path: a complete checkpoint.
        tensors: destination by name; names may be a part of what the checkpoint holds.
        alone: only this process reads, without a process group.

    Raises:
        UserError: a file is missing or damaged, or a name or shape is not in the checkpoint.
    """
    reader = SafeReader(path)
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(stored.get(name), "size", None)
        if size != tensor.shape:
            held = "nothing of that name" if size is None else f"shape {tuple(size)}"
            raise UserError(
                f"checkpoint {path}: {name}", f"holds {held}, not {tuple(tensor.shape)}", _ANEW
            )
    try:
        with warnings.catch_warnings():
            # It warns that a load without a process group is one of a single process.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(dict(tensors), storage_reader=SafeReader(path), no_dist=alone)
    except (CheckpointException, RuntimeError, OSError, ValueError, EOFError) as error:
        raise UserError(
            f"checkpoint {path}",
            f"cannot be read ({_first_cause(error)})",
            "resume from another checkpoint",
        ) from error


def _publish(partial: Path, final: Path, description: str) -> None:
    """Completes a checkpoint: description, flush to disk, rename."""
    with (partial / "state.json").open("w", encoding="utf-8") as file:
        file.write(description)
        file.flush()
        os.fsync(file.fileno())
    replaced = final.with_name(f".{final.name}.replaced.partial")
    if final.exists():
        # The same step again, after resuming from an older one.
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        failure = next(iter(error.failures.values()))[0]
        return _first_cause(failure)
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cannot_write(path: Path, error: BaseException) -> UserError:
    full = any(f"[Errno {code}]" in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    fix = "free some space" if full else "make run.dir writable"
    return UserError(
        f"checkpoint {path}", f"cannot be written ({_first_cause(error)})", f"{fix} and resume"
    )
