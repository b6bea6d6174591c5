"""Checkpoint folders: what is written, which one is chosen, which ones stay."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors, read_state
from ringattn.launch.checkpoint_choice import RUN_ID_FILE, Choice, choose_checkpoints
from ringattn.launch.checkpoint_writer import Retention
from tests.launch.checkpoints import IDENTITY, rewrite_state, save, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(value) for name, value in tensors_of(0).items()} | changes
    load_tensors(path, tensors, alone=True)
    return tensors


def steps_of(choice: Choice) -> list[int]:
    return [state.step for _, state in choice.candidates]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path)


def test_round_trip(saved: Path) -> None:
    for name, tensor in load(saved).items():
        assert torch.equal(tensor, tensors_of(4)[name])
    names = {path.name for path in saved.iterdir()} - {"state.json"}
    state = read_state(saved)
    assert state.files.keys() == names
    for name, entry in state.files.items():
        assert (saved / name).stat().st_size == entry.size
    assert (saved.parent.parent / RUN_ID_FILE).read_text() == "a\n"


def test_a_part_can_be_loaded(saved: Path) -> None:
    part = {"model/a": torch.zeros(20, 300)}
    load_tensors(saved, part, alone=True)
    assert torch.equal(part["model/a"], tensors_of(4)["model/a"])


def test_newest_comes_first(tmp_path: Path) -> None:
    for step in (4, 1_000_000, 30):
        save(tmp_path, step)
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "step-000030", root / ".step-000050.partial")
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["step-000004", "step-000030", "step-1000000"]
    assert choose_checkpoints("never", tmp_path, IDENTITY) == Choice()
    assert choose_checkpoints("auto", tmp_path / "none", IDENTITY) == Choice()
    choice = choose_checkpoints("auto", tmp_path, IDENTITY)
    assert steps_of(choice) == [1_000_000, 30, 4]
    assert not choice.problems
    assert choose_checkpoints(str(tmp_path), tmp_path / "none", IDENTITY) == choice
    one = choose_checkpoints(str(root / "step-000030"), tmp_path / "none", IDENTITY)
    assert steps_of(one) == [30]
    with pytest.raises(UserError, match="path of a complete checkpoint"):
        choose_checkpoints(str(tmp_path / "none"), tmp_path, IDENTITY)


def _never_completed(root: Path) -> None:
    (root / "step-000040").mkdir()


def _renamed(root: Path) -> None:
    shutil.copytree(root / "step-000004", root / "step-000040")


def _of_another_run(root: Path) -> None:
    save(root.parent, 40, run_id="b")
    (root.parent / RUN_ID_FILE).write_text("a\n")


def _of_another_seed(root: Path) -> None:
    save(root.parent, 40, identity={"seed": 2})


def _broken(root: Path) -> None:
    rewrite_state(save(root.parent, 40), position=3)


PASSED_OVER: dict[str, tuple[Callable[[Path], None], str]] = {
    "never completed": (_never_completed, "state.json: is missing"),
    "renamed": (_renamed, "state.json: is foreign: of step 4"),
    "of another run": (_of_another_run, "is foreign: of run b"),
    "of another seed": (_of_another_seed, "is of a run with another seed=1"),
    "broken state": (_broken, "state.json: is damaged"),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_is_passed_over_is_named(case: str, tmp_path: Path) -> None:
    save(tmp_path)
    spoil, words = PASSED_OVER[case]
    spoil(tmp_path / "checkpoints")
    choice = choose_checkpoints("auto", tmp_path, IDENTITY)
    assert steps_of(choice) == [4]
    (problem,) = choice.problems
    assert "step-000040" in problem
    assert words in problem
    # A named one is an error, and so is a folder where nothing is left.
    named = tmp_path / "checkpoints" / "step-000040"
    if case != "of another run":
        with pytest.raises(UserError):
            choose_checkpoints(str(named), tmp_path, IDENTITY)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    with pytest.raises(UserError) as caught:
        choose_checkpoints("auto", tmp_path, IDENTITY)
    assert "\n" not in str(caught.value)
    expected = "seed=1: must be 2" if case == "of another seed" else "no checkpoint can be used"
    assert expected in str(caught.value)


def test_a_folder_that_names_no_run_accepts_any(tmp_path: Path) -> None:
    save(tmp_path, 4, run_id="a")
    save(tmp_path, 8, run_id="b")
    assert steps_of(choose_checkpoints("auto", tmp_path, IDENTITY)) == [8]
    (tmp_path / RUN_ID_FILE).unlink()
    assert steps_of(choose_checkpoints("auto", tmp_path, IDENTITY)) == [8, 4]


def test_retention(tmp_path: Path) -> None:
    """Two newest and every tenth; others' folders, later steps and unreadable ones stay."""
    save(tmp_path, 1, run_id="b")
    (tmp_path / "checkpoints" / "step-000002").mkdir()
    for step in (5, 10, 14, 15, 99):
        save(tmp_path, step)
    keep = Retention(keep=2, keep_every=10)
    save(tmp_path, 20, retention=keep)
    steps = [int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(steps) == [1, 2, 10, 15, 20, 99]


def test_damaged_ones_are_not_counted_as_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step)
    save(tmp_path, 16, retention=Retention(keep=2, damaged={"step-000012"}))
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["step-000008", "step-000012", "step-000016"]
    save(tmp_path, 20, retention=Retention(keep=2, damaged={"step-000012"}))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000016", "step-000020"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path)
    saved = save(tmp_path)
    load(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_another_shape_or_name_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"model/a: holds shape \(20, 300\), not \(3, 3\)"):
        load(saved, **{"model/a": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="model/b: holds nothing of that name"):
        load(saved, **{"model/b": torch.zeros(3)})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path)
