"""The run folder: what it holds before the first step.

job                        which job writes here now; see `ringattn.launch.restart`
failures/                  reports of faults
config.yaml                resolved configuration, can be trained from again
model.json, tokenizer/     shape and tokenizer, so that the folder alone can generate text
run_id                     drawn when the run starts from step 0, and named by its checkpoints
metrics.jsonl, eval.jsonl, events.jsonl, tensorboard/, loss.png, summary.json, checkpoints/,
profile/
previous-N/                what an earlier run left, set aside by checkpoint.resume=never
"""

import errno
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.checkpoint_choice import RUN_ID_FILE, list_checkpoints
from ringattn.launch.config_load import dump_config
from ringattn.launch.events import EVENTS_FILE
from ringattn.launch.job import Job
from ringattn.launch.metrics import EVAL_FILE, METRICS_FILE
from ringattn.launch.model_config import ModelConfig, RopeScaling
from ringattn.launch.restart import FolderClaim
from ringattn.launch.tokenizer import Tokenizer, load_tokenizer

_STATE = ("checkpoints", RUN_ID_FILE, "tensorboard", METRICS_FILE, EVAL_FILE, EVENTS_FILE)


def open_run_folder(job: Job) -> FolderClaim:
    """Creates the run folder with its description; for the one rank that writes.

    A run that starts anew where another one left checkpoints moves them aside, so that they are
    neither lost nor taken for its own.

    Returns:
        The claim on the folder, to be released at the end.

    Raises:
        UserError: it cannot be written, or another job trains there.
    """
    folder = Path(job.config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Less than the other ranks wait for this one.
        claim = FolderClaim(folder, os.environ, min(10.0, job.config.run.timeout_s / 2))
        if job.checkpoint is None and list_checkpoints(folder):
            _set_aside(folder)
        (folder / "config.yaml").write_text(dump_config(job.config), encoding="utf-8")
        model = {"model": asdict(job.shape), "tokenizer": job.train.meta.tokenizer}
        (folder / "model.json").write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")
        if job.train.meta.tokenizer != "bytes":
            source = job.train.path / job.train.meta.tokenizer
            shutil.copytree(source, folder / "tokenizer", dirs_exist_ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if full else "name a writable folder"
        raise UserError(f"run.dir={folder}", f"cannot be written ({error})", fix) from None
    return claim


def read_model(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The model's shape and the tokenizer of a run.

    Raises:
        UserError: the folder is no run folder, or its description is broken.
    """
    path = folder / "model.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        shape = dict(raw["model"])
        if shape.get("rope_scaling") is not None:
            shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])
        model, tokenizer = ModelConfig(**shape), str(raw["tokenizer"])
    except FileNotFoundError:
        raise UserError(
            f"run {folder}", "holds no model.json", "name the run.dir of a run"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}", f"is no model description ({error})", "train again") from None
    return model, load_tokenizer("bytes" if tokenizer == "bytes" else folder / "tokenizer")


def _set_aside(folder: Path) -> None:
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    aside = folder / f"previous-{number}"
    aside.mkdir()
    for name in _STATE:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
