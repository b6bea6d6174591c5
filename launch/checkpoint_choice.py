"""Which checkpoints of a run there are, and which of them a run may continue from.

Only their descriptions are read here; `checkpoint_files` compares the files with them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.checkpoint_state import (
    ANEW,
    STATE_FILE,
    CheckpointState,
    check_identity,
    read_state,
)

RUN_ID_FILE = "run_id"
_NAME = re.compile(r"step-(\d{6,})")
_REPLACED = re.compile(r"\.step-(\d{6,})\.replaced")

Candidate = tuple[Path, CheckpointState]


@dataclass(frozen=True)
class Choice:
    """Checkpoints that ``checkpoint.resume`` allows.

    Attributes:
        candidates: with what they say of themselves, the one to take first.
        problems: checkpoints that were passed over, one line each.
    """

    candidates: tuple[Candidate, ...] = ()
    problems: tuple[str, ...] = ()


def checkpoints_of(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def path_of(run_dir: str | Path, step: int) -> Path:
    """The folder of one checkpoint of a run."""
    return checkpoints_of(run_dir) / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name, of whatever kind, tells."""
    return int(path.name.split("-", 1)[1].split(".")[0])


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Folders that stand as checkpoints of a run, oldest step first, damaged ones among them.

    One that a crash left between its old and its new version is there under its hidden name.
    """
    root = checkpoints_of(run_dir)
    if not root.is_dir():
        return []
    names = {path.name for path in root.iterdir()}
    found = [root / name for name in names if _NAME.fullmatch(name)]
    replaced = [root / name for name in names if _REPLACED.fullmatch(name)]
    found += [path for path in replaced if path_of(run_dir, step_of(path)).name not in names]
    return sorted(found, key=step_of)


def find_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest step first. Their files are not looked at."""
    return [path for path in list_checkpoints(run_dir) if (path / STATE_FILE).is_file()]


def is_checkpoint(path: Path) -> bool:
    """Whether a path names one checkpoint, sound or not, rather than a run."""
    return (path / STATE_FILE).is_file() or _NAME.fullmatch(path.name) is not None


def choose_checkpoints(resume: str, run_dir: str | Path, identity: dict[str, Any]) -> Choice:
    """The checkpoints that ``checkpoint.resume`` means, and why others are passed over.

    Args:
        resume: "auto", "never", or the path of a checkpoint or of a run with checkpoints.
        run_dir: the run's own folder.
        identity: what a checkpoint must share to be continued.

    Raises:
        UserError: a path that is no sound checkpoint; checkpoints, but none of this run; or all of
            them of a run with another identity.
    """
    if resume == "never":
        return Choice()
    if resume == "auto":
        return _choose(Path(run_dir), identity)
    named = Path(resume)
    if is_checkpoint(named):
        state = read_named_state(named, None)
        check_identity(named, state, identity)
        return Choice(((named, state),))
    if not list_checkpoints(named):
        raise UserError(
            f"checkpoint.resume={resume}",
            "must be auto, never, or the path of a complete checkpoint",
            f"name a step-… folder below {checkpoints_of(run_dir)}",
        )
    return _choose(named, identity)


def none_left(problems: tuple[str, ...]) -> UserError:
    """Says that no checkpoint can be used, and why each of them."""
    return UserError("checkpoint.resume", f"no checkpoint can be used: {'; '.join(problems)}", ANEW)


def read_run_id(run_dir: str | Path) -> str | None:
    """The name that the run in a folder drew when it started; None where nothing says so."""
    try:
        text = (Path(run_dir) / RUN_ID_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return text or None


def _choose(run_dir: Path, identity: dict[str, Any]) -> Choice:
    run_id = read_run_id(run_dir)
    candidates: list[Candidate] = []
    problems: list[str] = []
    others: list[UserError] = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            state = read_named_state(path, run_id)
        except UserError as error:
            problems.append(f"{error.what}: {error.rule}")
            continue
        try:
            check_identity(path, state, identity)
        except UserError as error:
            others.append(error)
            problems.append(f"checkpoint {path}: is of a run with another {error.what}")
        else:
            candidates.append((path, state))
    if problems and not candidates:
        raise others[0] if others else none_left(tuple(problems))
    return Choice(tuple(candidates), tuple(problems))


def read_named_state(path: Path, run_id: str | None) -> CheckpointState:
    """A checkpoint's description, where it is what its name and place say.

    Args:
        path: the checkpoint.
        run_id: of the run that it lies in; None where nothing says so.

    Raises:
        UserError: it is missing, damaged, of another step or of another run.
    """
    state, file = read_state(path), path / STATE_FILE
    named = _NAME.fullmatch(path.name) or _REPLACED.fullmatch(path.name)
    if named and int(named[1]) != state.step:
        raise UserError(f"checkpoint {file}", f"is foreign: of step {state.step}", ANEW)
    if run_id is not None and state.run_id != run_id:
        raise UserError(f"checkpoint {file}", f"is foreign: of run {state.run_id}", ANEW)
    return state
