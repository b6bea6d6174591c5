"""What a checkpoint says about itself: ``state.json``, which covers itself by a checksum."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ringattn.errors import UserError

FORMAT_VERSION = 3
STATE_FILE, METADATA_FILE = "state.json", ".metadata"
ANEW = "train anew with checkpoint.resume=never, or in another run.dir"
_OWN_SUM = "sha256"


@dataclass(frozen=True)
class FileSum:
    """A file's bytes and their SHA-256, hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint says about itself.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        step: optimizer steps done.
        position: tokens of the training stream read by them.
        guard: what the judge of steps remembers; see `ringattn.launch.guard.Guard.state`.
        run_id: names the run that wrote it; drawn when a run starts from step 0.
        identity: dotted keys and values that a run must share to continue from here: the seed,
            the model's shape, the data.
        config: the writer's whole configuration, for people.
        files: every other file of the checkpoint, by name.
    """

    format_version: int
    step: int
    position: int
    guard: list[float]
    run_id: str
    identity: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, FileSum]


def encode_state(state: CheckpointState) -> str:
    """The text of state.json."""
    raw = asdict(state)
    return json.dumps(raw | {_OWN_SUM: _digest(raw)}, indent=1) + "\n"


def read_state(path: Path) -> CheckpointState:
    """Reads state.json of a checkpoint.

    Raises:
        UserError: it is missing, broken, damaged or of another version.
    """
    file = path / STATE_FILE
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")  # reading a pipe would wait for ever
        text = file.read_bytes().decode()
        raw = json.loads(text)
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint {file}: format_version={version}",
                f"this program reads {FORMAT_VERSION}",
                ANEW,
            )
        if raw.pop(_OWN_SUM) != _digest(raw):
            raise ValueError("its sha256 differs")
        state = _decode(raw)
        if encode_state(state) != text:
            raise ValueError("it is not as it was written")
        return state
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"checkpoint {file}", "is missing", ANEW) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"checkpoint {file}", f"is damaged, no checkpoint description ({reason})", ANEW
        ) from None


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
                f"set it back, or {ANEW}",
            )


def _decode(raw: dict[str, Any]) -> CheckpointState:
    values = {f.name: raw[f.name] for f in fields(CheckpointState)}
    values["files"] = {name: FileSum(**entry) for name, entry in raw["files"].items()}
    state = CheckpointState(**values)
    sizes = [entry.size for entry in state.files.values()]
    for count in (state.step, state.position, *sizes):
        if not isinstance(count, int) or count < 0:
            raise ValueError("step, position and sizes must be counts")
    if any(Path(name).name != name for name in state.files) or METADATA_FILE not in state.files:
        raise ValueError("its list of files is none")
    if not all(isinstance(value, float) for value in state.guard):
        raise ValueError("guard must hold numbers")
    dict(state.identity)
    return state


def _digest(raw: dict[str, Any]) -> str:
    """SHA-256 of the content, whatever its layout as text."""
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
