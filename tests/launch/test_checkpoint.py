"""Checkpoint folders: complete or not there, and never a way to run code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import (
    FORMAT_VERSION,
    CheckpointState,
    check_identity,
    choose_checkpoint,
    find_checkpoints,
    load_tensors,
    read_state,
    save_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {"model/a": torch.arange(6.0).view(2, 3), "optimizer/a/step": torch.tensor(4.0)}


def save(run_dir: Path, step: int = 4, keep: int = 0) -> Path:
    state = CheckpointState(
        format_version=FORMAT_VERSION, step=step, position=step, identity={"seed": 1}, config={}
    )
    return save_checkpoint(run_dir, TENSORS, state, is_main=True, barrier=lambda: None, keep=keep)


def load(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(value) for name, value in TENSORS.items()} | changes
    load_tensors(path, tensors, alone=True)
    return tensors


def read_and_load(path: Path) -> None:
    read_state(path)
    load(path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path)


def test_round_trip(saved: Path) -> None:
    for name, tensor in load(saved).items():
        assert torch.equal(tensor, TENSORS[name])


def test_a_part_can_be_loaded(saved: Path) -> None:
    part = {"model/a": torch.zeros(2, 3)}
    load_tensors(saved, part, alone=True)
    assert torch.equal(part["model/a"], TENSORS["model/a"])


def test_newest_complete_one_is_found(tmp_path: Path) -> None:
    for step in (4, 1_000_000, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000040").mkdir()  # never completed
    shutil.copytree(
        tmp_path / "checkpoints" / "step-000030", tmp_path / "checkpoints" / ".step-000050.partial"
    )
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["step-000004", "step-000030", "step-1000000"]
    assert choose_checkpoint("auto", tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    assert choose_checkpoint("never", tmp_path) is None
    assert choose_checkpoint(str(tmp_path), "elsewhere") == choose_checkpoint("auto", tmp_path)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path)
    saved = save(tmp_path)
    load(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


class _Payload:
    """Unpickling it creates the file of its argument."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def _replace_metadata(payload: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / ".metadata").write_bytes(pickle.dumps(payload(path / "ran")))

    return spoil


def _point_outside(path: Path) -> None:
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (path.parent.parent / "secret").write_bytes(b"")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _edit_state(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | changes))

    return spoil


def _replace_state(text: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (path / "state.json").write_text(text)

    return spoil


def _truncate(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        (file,) = path.glob(name)
        file.write_bytes(file.read_bytes()[:-100])

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "metadata that runs code": (_replace_metadata(_Payload), "refused"),
    "metadata of another kind": (_replace_metadata(lambda _: {"a": 1}), "no checkpoint metadata"),
    "metadata truncated": (_truncate(".metadata"), "refused"),
    "metadata missing": (lambda path: (path / ".metadata").unlink(), "missing"),
    "metadata that points outside": (_point_outside, "missing"),
    "tensors truncated": (_truncate("*.distcp"), "cannot be read"),
    "tensors missing": (lambda path: next(path.glob("*.distcp")).unlink(), "missing"),
    "state truncated": (_truncate("state.json"), "description"),
    "state of another version": (_edit_state(format_version=99), "99"),
    "state without a step": (_edit_state(step="4"), "counts"),
    "state that is a list": (_replace_state("[]"), "description"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_damage_is_refused_by_name(case: str, saved: Path) -> None:
    spoil, words = SPOILED[case]
    spoil(saved)
    with pytest.raises(UserError, match=words) as caught:
        read_and_load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (saved / "ran").exists()


def test_another_shape_or_name_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"model/a: holds shape \(2, 3\), not \(3, 3\)"):
        load(saved, **{"model/a": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="model/b: holds nothing of that name"):
        load(saved, **{"model/b": torch.zeros(3)})


def test_another_run_is_refused(saved: Path) -> None:
    state = read_state(saved)
    check_identity(saved, state, {"seed": 1})
    with pytest.raises(UserError, match="seed=2: must be 1"):
        check_identity(saved, state, {"seed": 2})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path)
