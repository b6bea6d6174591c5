"""Weights of a checkpoint, without the state of its run: for a new run, a sample, an export."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import load_tensors, verify_tensors
from ringattn.launch.checkpoint_choice import (
    is_checkpoint,
    list_checkpoints,
    read_named_state,
    read_run_id,
)
from ringattn.launch.checkpoint_files import check_files
from ringattn.launch.checkpoint_reader import SafeReader
from ringattn.launch.checkpoint_state import METADATA_FILE
from ringattn.launch.failure import report_line
from ringattn.launch.model import Transformer
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.peers import ALONE, Peers

_PREFIX = "model/"
_ANOTHER = "name a run with one, or a step-… folder below RUN/checkpoints"


@dataclass(frozen=True, kw_only=True)
class WeightsChoice:
    """Checkpoints that weights may be taken from.

    Attributes:
        what: how the person named them.
        paths: the one to take first in front.
        names: of the tensors to read.
        run_id: of the run that they lie in; None where nothing says so.
        only: one checkpoint was named, which no other may replace.
    """

    what: str
    paths: tuple[Path, ...]
    names: frozenset[str]
    run_id: str | None = None
    only: bool = False


def load_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills an engine's tensors for a new run from a checkpoint; every rank calls it.

    Args:
        path: of the checkpoint, from `sound_weights`.
        tensors: as `ringattn.launch.engine.Engine.tensors` names them: parameters are read, the
            optimizer's states are zero.
    """
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIX):
            tensor.zero_()
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    load_tensors(path, own, verified=True)


def choose_weights(path: str | Path, shape: ModelConfig, what: str = "") -> WeightsChoice:
    """The checkpoints that a path means, checked against the model's shape.

    Reads descriptions and no tensor.

    Args:
        path: a ``step-…`` folder, or a run with checkpoints, of which the newest sound one is
            meant.
        shape: the model that the weights are for.
        what: how messages name the path; "" is ``checkpoint.weights``.

    Raises:
        UserError: no complete checkpoint, none whose description is sound, or one of a model with
            other parameters.
    """
    folder, what = Path(path), what or f"checkpoint.weights={path}"
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in Transformer(shape).named_parameters()}
    names = frozenset(f"{_PREFIX}{name}" for name in wanted)
    if is_checkpoint(folder):
        choice = WeightsChoice(what=what, paths=(folder,), names=names, only=True)
    else:
        paths, run_id = tuple(reversed(list_checkpoints(folder))), read_run_id(folder)
        choice = WeightsChoice(what=what, paths=paths, names=names, run_id=run_id)
    problems: list[str] = []
    for one in choice.paths:
        try:
            _check_description(one, choice.run_id)
        except UserError as error:
            if choice.only:
                raise
            problems.append(f"{error.what}: {error.rule}")
        else:
            _check_shapes(what, one, wanted)
            return choice
    raise _none_left(what, problems)


def sound_weights(
    choice: WeightsChoice, peers: Peers = ALONE, report: Callable[[str], None] = report_line
) -> Path:
    """The first checkpoint of a choice whose files are as they were written.

    Those that are damaged or foreign are named. The ranks of `peers` call it together and share
    the reading; the first one reports.

    Raises:
        UserError: on every rank alike, where none is sound, or the one that was named is not.
    """
    problems: list[str] = []
    for path in choice.paths:
        try:
            peers.share(partial(_check_description, path, choice.run_id))
            verify_tensors(path, set(choice.names), peers)
        except UserError as error:
            if choice.only:
                raise
            problems.append(f"{error.what}: {error.rule}")
            continue
        if problems and peers.is_main:
            for problem in problems:
                report(f"{problem}: not used")
            report(f"checkpoint {path} is used instead")
        return path
    raise _none_left(choice.what, problems)


def _none_left(what: str, problems: list[str]) -> UserError:
    rule = f"no checkpoint can be used: {'; '.join(problems)}"
    return UserError(what, rule if problems else "holds no complete checkpoint", _ANOTHER)


def _check_description(path: Path, run_id: str | None) -> None:
    """Refuses a checkpoint whose description is damaged, or foreign to its place."""
    read_named_state(path, run_id)
    check_files(path, {METADATA_FILE}, ALONE)
    SafeReader(path).read_metadata()


def _check_shapes(what: str, path: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = SafeReader(path).read_metadata().state_dict_metadata
    held = {
        name.removeprefix(_PREFIX): tuple(getattr(entry, "size", ()))
        for name, entry in stored.items()
        if name.startswith(_PREFIX)
    }
    for name in sorted(wanted.keys() | held.keys()):
        ours, theirs = (sizes.get(name, "no such parameter") for sizes in (wanted, held))
        if ours != theirs:
            raise UserError(
                f"{what}: {name}",
                f"the model has {ours}, the checkpoint {path} {theirs}",
                "set the sizes under model to those of the run that wrote it",
            )
