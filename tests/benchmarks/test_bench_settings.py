"""Settings of the suites: strict, shipped, changed by the command line."""

from pathlib import Path

import pytest

from ringattn.benchmarks.suites.command import Request, resolved
from ringattn.benchmarks.suites.settings import ALL_METHODS, load_settings, method_names
from ringattn.errors import UserError


@pytest.mark.parametrize("name", ["smoke", "long"])
def test_shipped_settings_load_and_cover_everything(name: str) -> None:
    settings = load_settings(name)
    assert settings.common.masks == ("all",)
    assert settings.common.ranks == (1, 2, 4)
    assert method_names(settings.methods.methods) == ALL_METHODS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("common: {seeds: 1}", "common.seed"),
        ("methods: {seq: [512]}", "methods.methods"),
        ("method: {}", "kernels, methods, masks"),
        ("methods: {seq_len: 512}", "list"),
        ("methods: {seq_len: [a]}", "integer"),
        ("methods: {seq_len: [64]}", "128"),
        ("common: {masks: [cusal]}", "longca"),
        ("common: {lengths: [shortest]}", "long_mix"),
        ("common: {packs: 0}", "positive"),
        ("common: {least: 3}", "common.most"),
        ("common: {dtype: int8}", "bfloat16"),
        ("methods: {methods: [rings]}", "double_ring"),
        ("kernels: {kernels: [fa2]}", "cpu_flash"),
        ("common: 3", "section"),
        ("[1]", "mapping"),
        ("common: {seed: 1, seed: 2}", "twice"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_is_known(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(str(file))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_and_flags_replace_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("common: {packs: 2}\nmethods: {seq_len: [256]}")
    settings = load_settings(str(file), ["methods.seq_len=[512, 1024]"])
    assert settings.common.packs == 2
    assert settings.methods.seq_len == (512, 1024)
    with pytest.raises(UserError, match="known"):
        load_settings(str(file), ["methods.length=1"])
    request = Request(
        suite="all", settings="smoke", out="results", ranks=(2,), masks=("causal",),
        methods=("ring",), peers=False,
    )  # fmt: skip
    changed = resolved(request)
    assert changed.common.ranks == (2,)
    assert changed.common.masks == changed.kernels.masks == changed.scaling.masks == ("causal",)
    assert changed.methods.methods == changed.scaling.methods == ("ring",)
    assert not changed.common.peers


def test_the_command_of_a_part_can_be_run_again() -> None:
    settings = load_settings("smoke", ["methods.seq_len=[256]"])
    text = settings.command("methods", "--masks causal", "--ranks 2")
    assert text == (
        "ringattn bench methods --settings smoke methods.seq_len=[256] --masks causal --ranks 2"
    )
