"""Writes one checkpoint: all of it under a hidden name, then published by a rename.

    .step-000123.partial     being written
    .step-000123.replaced    an older one of the same step, until the new one has its name

A crash at any moment leaves hidden folders behind at worst; the next checkpoint removes them, and
gives a replaced one its name back if the new one never got it.
"""

import errno
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ringattn.errors import UserError
from ringattn.launch.checkpoint_choice import (
    RUN_ID_FILE,
    list_checkpoints,
    path_of,
    read_run_id,
    step_of,
)
from ringattn.launch.checkpoint_files import SummingWriter
from ringattn.launch.checkpoint_state import STATE_FILE, CheckpointState, encode_state, read_state
from ringattn.launch.peers import Peers, first_cause
from ringattn.launch.snapshot import own_bytes

_ENTRY_BYTES = 2048  # of headers and alignment around a tensor, and its entry in .metadata
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which older checkpoints stay when a new one is published.

    Attributes:
        keep: newest ones to keep; 0 keeps all.
        keep_every: steps that it divides are kept for good; 0 for none.
        damaged: names of checkpoints that were found damaged; they are never counted as kept.
    """

    keep: int
    keep_every: int = 0
    damaged: Collection[str] = ()


class SaveError(UserError):
    """A checkpoint could not be written: the disk is full, read-only, over quota or gone."""


def write_checkpoint(
    run_dir: Path,
    tensors: dict[str, torch.Tensor],
    state: CheckpointState,
    *,
    peers: Peers,
    retention: Retention,
) -> Path:
    """Writes one checkpoint; every rank calls it together.

    Args:
        run_dir: the run's folder, shared by all ranks.
        tensors: by name; this rank writes what it holds of sharded ones, and a share of the others.
        state: goes to state.json; its `files` are found here.
        peers: the ranks; no other thread may use their group meanwhile.
        retention: what is removed once the new one is complete.

    Returns:
        The complete folder.

    Raises:
        SaveError: on every rank, when the folder cannot be written; nothing of it is left.
    """
    final = path_of(run_dir, state.step)
    partial = final.with_name(f".{final.name}.partial")
    needed = 0
    try:
        sizes = own_bytes(tensors) + _ENTRY_BYTES * len(tensors) // peers.world
        needed = peers.agree(lambda: sizes, sum)
        peers.share(lambda: _prepare(run_dir, state.run_id, partial, needed))
        writer = SummingWriter(partial)
        dcp.save(
            dict(tensors), storage_writer=writer, process_group=peers.group,
            no_dist=peers.group is None,
        )  # fmt: skip
        peers.agree(
            lambda: writer.sums,
            lambda parts: _publish(
                partial, final, replace(state, files={k: v for p in parts for k, v in p.items()})
            ),
        )
    except (OSError, CheckpointException) as error:
        if peers.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_write(final, first_cause(error), needed) from error
    if peers.is_main:
        _retire(run_dir, state, retention)
    return final


def _prepare(run_dir: Path, run_id: str, partial: Path, needed: int) -> None:
    """Cleans up after a crash, and makes the folder to write into if there is room for it."""
    root = partial.parent
    root.mkdir(parents=True, exist_ok=True)
    _keep_run_id(run_dir, run_id)
    for leftover in root.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in root.glob(".step-*.replaced"):
        if (home := path_of(run_dir, step_of(replaced))).exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, home)
    if shutil.disk_usage(root).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root))
    partial.mkdir()


def _keep_run_id(run_dir: Path, run_id: str) -> None:
    """Writes the run's name into its folder, before its first checkpoint."""
    if read_run_id(run_dir) != run_id:
        file = run_dir / RUN_ID_FILE
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(run_id + "\n", encoding="utf-8")
        os.replace(partial, file)


def _publish(partial: Path, final: Path, state: CheckpointState) -> None:
    """Completes a checkpoint: description, flush to disk, rename."""
    with (partial / STATE_FILE).open("x", encoding="utf-8") as file:
        file.write(encode_state(state))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        # The same step again, after resuming from an older one.
        os.replace(final, replaced)
    os.replace(partial, final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _retire(run_dir: Path, new: CheckpointState, retention: Retention) -> None:
    """Removes checkpoints of this run beyond the newest ones that are sound.

    Later steps than the new one's are of a run that this one left at an earlier checkpoint, and
    folders without a readable state or of another run were not written by this one: they stay.
    """
    if not retention.keep:
        return
    kept = 0
    for path in reversed(list_checkpoints(run_dir)):
        step = step_of(path)
        if step > new.step:
            continue
        try:
            state = read_state(path)
        except UserError:
            continue
        if state.run_id != new.run_id or state.step != step:
            continue
        if kept < retention.keep:
            kept += path.name not in retention.damaged
        elif not (retention.keep_every and step % retention.keep_every == 0):
            # Renamed first: half of a folder never stands under a checkpoint's name.
            hidden = path.with_name(f".{path.name}.partial")
            try:
                os.replace(path, hidden)
            except OSError:
                continue
            shutil.rmtree(hidden, ignore_errors=True)


def _cannot_write(path: Path, error: BaseException, needed: int) -> SaveError:
    number = error.errno if isinstance(error, OSError) else None
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    rule = f"cannot be written ({reason})"
    if needed:
        rule += f": needs {needed:,} bytes, {_free(path)}"
    fix = "free some space" if number in _FULL else "make run.dir writable"
    return SaveError(f"checkpoint {path}", rule, f"{fix} and resume")


def _free(path: Path) -> str:
    for folder in path.parents:
        try:
            return f"{shutil.disk_usage(folder).free:,} are free"
        except OSError:
            continue
    return "how many are free is not known"
