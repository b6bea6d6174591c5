"""Settings of activation memory in the trainer: what is refused, and equal losses."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ringattn import UserError
from ringattn.launch import config_check
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus

MODES = ["none", "full", "attention", "sequence"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"memory.offload": True}, "memory.checkpointing=none"),
        ({"memory.recompute": 1.5}, "at most 1"),
        ({"memory.recompute": float("nan")}, "must be"),
        ({"memory.checkpointing": "sequence", "attention.save": True}, "attention.save=false"),
        ({"memory.token_tile": 0}, "at least 1"),
    ],
)
def test_settings_that_contradict(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(config_from_values(values))


def test_compiling_without_a_compiler() -> None:
    config = config_from_values({"train.compile": True, "run.device": "cpu"})
    with (
        mock.patch.object(config_check.shutil, "which", return_value=None),
        pytest.raises(UserError, match=r"C\+\+ compiler"),
    ):
        check_config(config)
    elsewhere = config_from_values({"train.compile": True, "run.device": "cuda"})
    with mock.patch.object(config_check.shutil, "which", return_value=None):
        check_config(elsewhere)


STEPS = {"train.steps": 30}
RUNS = {
    "full tiled offload": {
        "memory.checkpointing": "full", "memory.token_tile": 48, "memory.offload": True
    },
    "cp2 attention tiled": {
        "parallel.cp": 2, "memory.checkpointing": "attention", "memory.token_tile": 32
    },
    "cp2 sequence offload": {
        "parallel.cp": 2, "memory.checkpointing": "sequence", "memory.offload": True
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """30 steps on one rank that keep everything."""
    return train_pooled(tiny_values(corpus, tmp_path_factory.mktemp("one") / "run") | STEPS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("run", RUNS)
def test_training_is_the_same(
    run: str, corpus: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    got = train_pooled(tiny_values(corpus, tmp_path / "run") | STEPS | RUNS[run])
    assert_parity(plain, got)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [None, 40])
def test_compiled_training_is_the_same(
    mode: str, tile: int | None, corpus: Path, plain: list[dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run") | STEPS
    values |= {"memory.checkpointing": mode, "memory.token_tile": tile}
    assert_parity(plain, train_pooled(values | {"train.compile": True, "parallel.cp": 2}))
