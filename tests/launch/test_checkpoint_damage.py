"""Damaged checkpoints are found out by name, never read, never a way to run code."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors, read_state
from ringattn.launch.checkpoint_files import find_problems
from ringattn.launch.evaluate_run import ContextRequest, evaluate_run
from ringattn.launch.main import main
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.peers import ALONE
from tests.launch.checkpoints import (
    DAMAGES,
    comparable,
    problems_of,
    reseal,
    rewrite_state,
    save,
    sound_checkpoints,
    stored_tensors,
    tensors_of,
    train_outcomes,
)
from tests.launch.training import tiny_values, train_pooled, uneven_corpus

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _damaged_is_named(tmp_path: Path, damage: str, draw: random.Random) -> None:
    older, newest = save(tmp_path, 4), save(tmp_path, 8)
    assert sound_checkpoints(tmp_path) == [newest, older]
    name = DAMAGES[damage](newest, draw)
    problems = problems_of(newest)
    assert len(problems) == 1, problems
    assert name in problems[0]
    assert "\n" not in problems[0]
    assert sound_checkpoints(tmp_path) == [older]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_one_used(damage: str, tmp_path: Path, seed: int) -> None:
    _damaged_is_named(tmp_path, damage, random.Random(seed))


@pytest.mark.full
@pytest.mark.parametrize("number", range(50))
def test_damage_of_any_kind(number: int, tmp_path: Path, seed: int) -> None:
    """Random kind, file, byte and bit: 50 of 50."""
    _damaged_is_named(tmp_path, [*DAMAGES][number % len(DAMAGES)], random.Random(seed))


def test_words_for_each_kind(tmp_path: Path) -> None:
    save(tmp_path, 4)
    newest = save(tmp_path, 8)
    tensors = newest / "__0_0.distcp"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    assert problems_of(newest) == [
        f"file __0_0.distcp is truncated: {len(content) - 1:,} of {len(content):,} bytes"
    ]
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert problems_of(newest) == ["file __0_0.distcp is damaged: its sha256 differs"]
    tensors.write_bytes((newest.parent / "step-000004" / tensors.name).read_bytes())
    (newest / "extra").write_bytes(b"")
    (newest / ".nfs0001").write_bytes(b"")
    (newest / ".metadata").unlink()
    assert problems_of(newest) == [
        "file .metadata is missing",
        "file __0_0.distcp is foreign: one of step-000004",
        "file extra is foreign: no part of this checkpoint",
    ]


class _Payload:
    """Unpickling it creates the folder of its argument."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def _bomb_in_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(_Payload(path.parent / "ran")))


def _bomb_in_tensors(path: Path) -> None:
    torch.save(_Payload(path.parent / "ran"), path / "__0_0.distcp")


def _bare_bomb_in_tensors(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(pickle.dumps(_Payload(path.parent / "ran")))


def _bomb_as_state(path: Path) -> None:
    (path / "state.json").write_bytes(pickle.dumps(_Payload(path.parent / "ran")))


def _metadata_of_another_kind(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def _point_outside(path: Path) -> None:
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (path.parent.parent / "secret").write_bytes(b"")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


# Whether the sums of the files are made right again, and what is said.
HARMFUL: dict[str, tuple[Callable[[Path], None], str]] = {
    "metadata that runs code": (_bomb_in_metadata, "refused: names posix.mkdir"),
    "tensors that run code": (_bomb_in_tensors, "cannot be read"),
    "a bare pickle of code": (_bare_bomb_in_tensors, "cannot be read"),
    "metadata of another kind": (_metadata_of_another_kind, "no checkpoint metadata"),
    "metadata that points outside": (_point_outside, "is missing"),
}


def _read(path: Path) -> None:
    read_state(path)
    tensors = {name: torch.zeros_like(value) for name, value in tensors_of(0).items()}
    load_tensors(path, tensors, alone=True)


@pytest.mark.parametrize("case", HARMFUL)
def test_harmful_content_is_refused(case: str, tmp_path: Path) -> None:
    """Caught by its sum; with right sums, by what it is. Never run."""
    spoil, words = HARMFUL[case]
    path = save(tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=r"damaged|truncated"):
        _read(path)
    reseal(path)
    assert not problems_of(path)
    with pytest.raises(UserError, match=words) as caught:
        _read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (path.parent / "ran").exists()


def test_a_pickle_in_place_of_the_state(tmp_path: Path) -> None:
    path = save(tmp_path)
    _bomb_as_state(path)
    with pytest.raises(UserError, match=r"state\.json: is damaged"):
        _read(path)
    assert not (path.parent / "ran").exists()


def test_a_run_folder_whose_config_runs_code(tmp_path: Path) -> None:
    text = f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"tag .*os\.mkdir.* refused"):
        evaluate_run(ContextRequest(run=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "another version": ({"format_version": 2}, "format_version=2: this program reads 3"),
    "another step": ({"step": 5}, "sha256 differs"),
    "a step that is text": ({"step": "4"}, "sha256 differs"),
    "no files": ({"files": {}}, "sha256 differs"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_changed_state_is_refused(case: str, tmp_path: Path) -> None:
    changes, words = STATES[case]
    path = save(tmp_path)
    rewrite_state(path, **changes)
    with pytest.raises(UserError, match=words):
        read_state(path)


@pytest.mark.parametrize("text", ["[]", "", "{}", '"a"', "[" * 100_000, "\0"])
def test_a_state_that_is_none(text: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"state\.json: is damaged"):
        read_state(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_training_goes_on_from_the_previous_one(corpus: Path, tmp_path: Path) -> None:
    """A damaged tensor file in the newest and a file too many in the one before: both are named
    once, and the run ends as if it had never stopped."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=8)
    values |= {"checkpoint.every": 2, "checkpoint.keep": 0}
    expected = train_pooled(values | {"run.dir": str(tmp_path / "undisturbed")})
    train_pooled(values | {"train.steps": 6})
    saved = find_checkpoints(tmp_path / "run")
    _flip(saved[-1] / "__1_0.distcp")
    (saved[-2] / "__9_0.distcp").write_bytes(b"")
    (first, second) = train_outcomes(values)
    assert first[0] is None
    assert second == (None, "")
    said = [line for line in first[1].splitlines() if line.startswith("ringattn: ")]
    assert len(said) == 3
    assert "step-000006: file __1_0.distcp is damaged" in said[0]
    assert "step-000004: file __9_0.distcp is foreign" in said[1]
    assert "step-000002 is used instead" in said[2]
    assert comparable(read_lines(tmp_path / "run" / METRICS_FILE)) == comparable(expected)
    # What was damaged has been written anew.
    sound = find_checkpoints(tmp_path / "run")
    assert len(sound) == 4
    for path in sound:
        assert not find_problems(path, read_state(path), ALONE)
    want = stored_tensors(tmp_path / "undisturbed" / "checkpoints" / "step-000008")
    for name, tensor in stored_tensors(sound[-1]).items():
        assert torch.equal(tensor, want[name]), name


def test_nothing_sound_is_left(corpus: Path, tmp_path: Path) -> None:
    """The run does not start anew in silence, and a named checkpoint is not replaced by another."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    values |= {"checkpoint.every": 2}
    train_pooled(values)
    older, newest = find_checkpoints(tmp_path / "run")
    _flip(newest / "__0_0.distcp")
    named = train_outcomes(values | {"checkpoint.resume": str(newest), "train.steps": 5})
    for error, _ in named:
        assert error is not None
        assert "step-000004: file __0_0.distcp is damaged" in error
    (older / ".metadata").unlink()
    for error, _ in train_outcomes(values | {"train.steps": 5}):
        assert error is not None
        assert "no checkpoint can be used" in error
        assert "step-000002: file .metadata is missing" in error


def test_a_pipe_in_place_of_the_state_is_not_waited_for(tmp_path: Path) -> None:
    state = save(tmp_path, 4) / "state.json"
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(UserError, match=r"state\.json: is damaged.*it is no file"):
        read_state(state.parent)


@pytest.fixture(scope="module")
def three_saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 1 to 3, which tests copy."""
    folder = tmp_path_factory.mktemp("three") / "run"
    values = tiny_values(corpus, folder, parallel__cp=1, train__steps=3)
    train_pooled(values | {"checkpoint.every": 1, "checkpoint.keep": 0})
    return folder


@pytest.fixture
def damaged_run(three_saved: Path, tmp_path: Path) -> Path:
    """Its newest checkpoint has a flipped bit, the one before a cut description."""
    run = shutil.copytree(three_saved, tmp_path / "damaged")
    _, older, newest = find_checkpoints(run)
    _flip(newest / "__0_0.distcp")
    state = older / "state.json"
    state.write_bytes(state.read_bytes()[:-30])
    return run


def _assert_both_are_named(err: str) -> None:
    said = [line for line in err.splitlines() if line.startswith("ringattn: ")]
    assert len(said) == 3, said
    assert "step-000003: file __0_0.distcp is damaged" in said[0]
    assert "step-000002/state.json: is damaged" in said[1]
    assert "step-000001 is used instead" in said[2]


def test_a_sample_is_of_the_newest_sound_one(
    damaged_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(damaged_run), "--prompt", "the", "--tokens", "2"]) == 0
    _assert_both_are_named(capfd.readouterr().err)


def test_an_export_is_of_the_newest_sound_one(
    damaged_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that was asked for by its step is not replaced by another."""
    arguments = ["export", str(damaged_run), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--checkpoint", "3"]) == 2
    assert "step-000003: file __0_0.distcp is damaged" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert "step-000001" in out
    _assert_both_are_named(err)
    _flip(damaged_run / "checkpoints" / "step-000001" / ".metadata")
    assert main(["export", str(damaged_run), "--out", str(tmp_path / "none")]) == 2
    assert "no checkpoint can be used" in capfd.readouterr().err


def test_an_evaluation_is_of_the_newest_sound_one(
    damaged_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = ContextRequest(
        run=str(damaged_run), tests=("position",), lengths=(64,), samples=1, out=str(tmp_path / "o")
    )
    assert evaluate_run(request) == 0
    _assert_both_are_named(capfd.readouterr().err)
    assert json.loads((tmp_path / "o" / "context.json").read_text())["step"] == 1


def test_weights_are_of_the_newest_sound_one(
    damaged_run: Path, corpus: Path, tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=1)
    first, second = train_outcomes(values | {"checkpoint.weights": str(damaged_run)})
    assert (first[0], second) == (None, (None, ""))
    _assert_both_are_named(first[1])
