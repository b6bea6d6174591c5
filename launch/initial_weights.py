"""Weights that a new run takes from a checkpoint of another one."""

from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors, read_state
from ringattn.launch.checkpoint_reader import SafeReader
from ringattn.launch.model import Transformer
from ringattn.launch.model_config import ModelConfig

_PREFIX = "model/"


def load_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills an engine's tensors for a new run from a checkpoint; every rank calls it.

    Args:
        path: of the checkpoint, from `choose_weights`.
        tensors: as `ringattn.launch.engine.Engine.tensors` names them: parameters are read, the
            optimizer's states are zero.
    """
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIX):
            tensor.zero_()
    load_tensors(path, {k: v for k, v in tensors.items() if k.startswith(_PREFIX)})


def choose_weights(path: str, shape: ModelConfig) -> Path:
    """The checkpoint that ``checkpoint.weights`` means, checked against the model's shape.

    Reads no tensor.

    Args:
        path: a ``step-…`` folder, or a run with checkpoints, whose newest is taken.
        shape: the model that the weights are for.

    Raises:
        UserError: no complete checkpoint, or one of a model with other parameters.
    """
    folder = Path(path)
    if not (folder / "state.json").is_file():
        found = find_checkpoints(folder)
        if not found:
            raise UserError(
                f"checkpoint.weights={path}",
                "must be the path of a complete checkpoint, or of a run with one",
                "name a step-… folder below RUN/checkpoints",
            )
        folder = found[-1]
    read_state(folder)
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    held = {k.removeprefix(_PREFIX): e for k, e in stored.items() if k.startswith(_PREFIX)}
    with torch.device("meta"):
        wanted = dict(Transformer(shape).named_parameters())
    for name in sorted(wanted.keys() | held.keys()):
        ours = tuple(wanted[name].shape) if name in wanted else "no such parameter"
        theirs = tuple(getattr(held[name], "size", ())) if name in held else "no such parameter"
        if ours != theirs:
            raise UserError(
                f"checkpoint.weights={folder}: {name}",
                f"the model has {ours}, the checkpoint {theirs}",
                "set the sizes under model to those of the run that wrote it",
            )
    return folder
