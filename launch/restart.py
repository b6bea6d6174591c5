"""What a run does differently when a launcher has started its ranks again."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ringattn.launch.config import Config

JOB_FILE = "job"  # in the run folder: which job of the launcher writes there


def restart_count(environ: Mapping[str, str]) -> int:
    """How often the elastic agent has started this job's ranks again."""
    text = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


def job_name(environ: Mapping[str, str]) -> str:
    """A name that all ranks of a job share, also after restarts; "" without an elastic agent."""
    return environ.get("TORCHELASTIC_RUN_ID", "")


def resume_after_restart(config: Config, environ: Mapping[str, str]) -> Config:
    """After a restart a run goes on from its own newest checkpoint, wherever it was told to begin.

    It does so once the job has opened its run folder; before that nothing of its own is there.
    """
    own = Path(config.run.dir) / JOB_FILE
    if restart_count(environ) == 0 or not own.is_file():
        return config
    if own.read_text(encoding="utf-8") != job_name(environ):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
