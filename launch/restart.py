"""Whose a run folder is: what a restarted job takes up again, and what another job must not share.

``RUN/job`` holds two lines: the launcher's name for the job, and a token of the life of the ranks
that write there now.
"""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ringattn.errors import UserError
from ringattn.launch.checkpoint_choice import list_checkpoints
from ringattn.launch.config import Config

JOB_FILE = "job"


def restart_count(environ: Mapping[str, str]) -> int:
    """How often the elastic agent has started this job's ranks again."""
    text = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def job_name(environ: Mapping[str, str]) -> str:
    """A name that all ranks of a job share, also after restarts; "" without an elastic agent."""
    return environ.get("TORCHELASTIC_RUN_ID", "")


def resume_after_restart(config: Config, environ: Mapping[str, str]) -> Config:
    """After a restart a run goes on from its own newest checkpoint, wherever it was told to begin.

    It does so once the job has saved one there; before that it begins again where it was told to.
    """
    own = Path(config.run.dir) / JOB_FILE
    if restart_count(environ) == 0 or not own.is_file():
        return config
    if own.read_text(encoding="utf-8").partition("\n")[0] != job_name(environ):
        return config
    if not list_checkpoints(config.run.dir):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


def claim_folder(run_dir: Path, environ: Mapping[str, str]) -> str:
    """Makes a run folder this job's; returns the token of its ranks' life. For one rank."""
    token = secrets.token_hex(8)
    (run_dir / JOB_FILE).write_text(f"{job_name(environ)}\n{token}\n", encoding="utf-8")
    return token


def check_claim(run_dir: Path, token: str) -> None:
    """Whether the folder is still claimed by `token`, before something is written that matters.

    Ranks whose launcher was killed may live on for a while beside those of its successor.

    Raises:
        UserError: another job has taken the folder over.
    """
    try:
        lines = (run_dir / JOB_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # whoever writes the checkpoint says what is wrong with the folder
    if len(lines) == 2 and lines[1] != token:
        raise UserError(
            f"run.dir={run_dir}",
            "another job has begun to write there",
            "let one job at a time train in a run folder; this one ends",
        )
