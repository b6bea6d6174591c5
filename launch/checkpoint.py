"""Checkpoints of a run: one folder per saved step, whole or not there at all.

    RUN/checkpoints/step-000123/
        .metadata, __R_N.distcp    tensors, written by `torch.distributed.checkpoint`
        state.json                 `CheckpointState`, with the sums of all files; written last

Tensors are stored under names and shapes that do not depend on dp or cp, so that any number of
ranks can read them. `checkpoint_writer` writes, `checkpoint_choice` finds, `checkpoint_files`
verifies; this file reads.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ringattn.errors import UserError
from ringattn.launch.checkpoint_choice import find_checkpoints
from ringattn.launch.checkpoint_files import check_files
from ringattn.launch.checkpoint_reader import SafeReader
from ringattn.launch.checkpoint_state import (
    ANEW,
    METADATA_FILE,
    CheckpointState,
    check_identity,
    read_state,
)
from ringattn.launch.peers import ALONE, Peers, default_peers, first_cause

__all__ = [
    "CheckpointState",
    "check_identity",
    "find_checkpoints",
    "load_tensors",
    "read_state",
    "verify_tensors",
]


def load_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    *,
    alone: bool = False,
    peers: Peers | None = None,
    verified: bool = False,
) -> None:
    """Fills `tensors` in place from a checkpoint. Every rank calls it, unless `alone`.

    Args:
        path: a complete checkpoint.
        tensors: destination by name; names may be a part of what the checkpoint holds.
        alone: only this process reads, without a process group.
        peers: the ranks that read together; None is the default group's.
        verified: the files were compared with their sums before; else those that hold the tensors
            are compared now, each by one rank.

    Raises:
        UserError: a file is missing or damaged, or a name or shape is not in the checkpoint.
    """
    peers = ALONE if alone else peers or default_peers()
    if not verified:
        verify_tensors(path, set(tensors), peers)
    stored = SafeReader(path).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        size = getattr(stored.get(name), "size", None)
        if size != tensor.shape:
            held = "nothing of that name" if size is None else f"shape {tuple(size)}"
            raise UserError(
                f"checkpoint {path}: {name}", f"holds {held}, not {tuple(tensor.shape)}", ANEW
            )
    try:
        with warnings.catch_warnings():
            # It warns that a load without a process group is one of a single process.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(
                dict(tensors),
                storage_reader=SafeReader(path),
                process_group=peers.group,
                no_dist=peers.group is None,
            )
    except (CheckpointException, RuntimeError, OSError, ValueError, EOFError) as error:
        cause = first_cause(error)
        reason = (str(cause).splitlines() or [""])[0] or type(cause).__name__
        raise UserError(
            f"checkpoint {path}", f"cannot be read ({reason})", "resume from another checkpoint"
        ) from error


def verify_tensors(path: Path, names: set[str], peers: Peers = ALONE) -> None:
    """Compares the files that hold these tensors with their sums; the ranks share the files.

    Raises:
        UserError: naming the first file that is missing, truncated or damaged.
    """
    check_files(path, {METADATA_FILE}, peers)
    places = SafeReader(path).read_metadata().storage_data or {}
    check_files(path, {str(p.relative_path) for i, p in places.items() if i.fqn in names}, peers)
