"""Settings of activation memory in the trainer that are refused."""

from typing import Any
from unittest import mock

import pytest

from ringattn import UserError
from ringattn.launch import config_check
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values


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
