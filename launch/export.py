"""``ringattn export``: a run's checkpoint as a Hugging Face folder."""

import shutil
from pathlib import Path

import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors, read_state
from ringattn.launch.checkpoint_choice import step_of
from ringattn.launch.hf_config import config_to_hf
from ringattn.launch.hf_weights import parameter_shapes
from ringattn.launch.hf_writer import DTYPES, MAX_FILE_BYTES, write_hf_folder
from ringattn.launch.initial_weights import choose_weights, sound_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.run_folder import read_model


def export_run(
    folder: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    step: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes the weights of a run's checkpoint, its config.json and its tokenizer.

    One tensor is in memory at a time.

    Args:
        folder: of the run.
        out: folder to write; new or empty.
        dtype: "bf16" or "fp32".
        step: of the checkpoint; None takes the newest sound one.
        max_file_bytes: bound on one file of weights.

    Returns:
        The checkpoint that was read.

    Raises:
        UserError: no such run or checkpoint, a model that Hugging Face has no type for, or a
            folder that cannot be written.
    """
    shape, tokenizer = read_model(folder)
    path = _checkpoint(folder, step, shape)
    trained = read_state(path).config.get("data", {}).get("seq_len")
    config = config_to_hf(
        shape,
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
        eos_token_id=tokenizer.eos_id,
        seq_len=trained,
    )

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name])
        load_tensors(path, {f"model/{name}": tensor}, alone=True, verified=True)
        return tensor

    shapes = parameter_shapes(shape)
    write_hf_folder(out, config, shapes, read, dtype=DTYPES[dtype], max_file_bytes=max_file_bytes)
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", out, dirs_exist_ok=True)
    return path


def _checkpoint(folder: Path, step: int | None, shape: ModelConfig) -> Path:
    """The newest sound checkpoint; or the one of that step, which has to be sound."""
    what = f"run {folder}"
    if step is None:
        return sound_weights(choose_weights(folder, shape, what))
    found = find_checkpoints(folder)
    steps = [step_of(path) for path in found]
    if step not in steps:
        raise UserError(
            f"--checkpoint {step}", f"is not among the steps kept, {steps}", "name one of them"
        )
    return sound_weights(choose_weights(found[steps.index(step)], shape, what))
