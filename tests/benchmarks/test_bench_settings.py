"""Settings of the suites: strict, shipped, changed by the command line."""

from pathlib import Path

import pytest

from ringattn.benchmarks.suites import command
from ringattn.benchmarks.suites.command import Request, resolved
from ringattn.benchmarks.suites.settings import ALL_METHODS, load_settings, method_names
from ringattn.errors import UserError
from ringattn.launch.main import main


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
        ("common: {heads: [3, 2]}", "multiple"),
        ("kernels: {heads: [[8, 2], [8, 3]]}", "kernels.heads"),
        ("common: {timeout_s: .nan}", "positive"),
        ("common: {packs: 5000000000}", "over"),
        ("common: {precision: -1}", "positive"),
        ("simulated: {gpus: [8, 100]}", "8 to 100"),
        ("simulated: {gpus: [64, 8]}", "gpus"),
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


def test_overrides_of_other_suites_are_left_out_of_a_suites_command() -> None:
    settings = load_settings("smoke", ["methods.seq_len=[256]", "common.packs=2"])
    text = settings.command("masks", "--ranks 2")
    assert text == "ringattn bench masks --settings smoke common.packs=2 --ranks 2"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["masks", "methods.seq_len=[512]"], "no effect on bench masks"),
        (["scaling", "--simulate", "common.masks=[full]"], "no effect on bench scaling --simulate"),
        (["methods", "--simulate"], "only scaling"),
        (["methods", "--ranks", "two"], "--ranks two"),
        (["methods", "--ranks", "0"], "--ranks 0"),
        (["methods", "--settings", "BINARY"], "readable"),
        (["methods", "--out", "/proc/none/here"], "writable"),
    ],
)
def test_what_would_have_no_effect_or_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    words = [str(tmp_path / "binary") if word == "BINARY" else word for word in words]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_overrides_may_follow_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(command, "bench", lambda request: found.append(request) or 0)
    assert main(["bench", "methods", "--ranks", "1", "2", "methods.seq_len=[256]"]) == 0
    assert found[0].ranks == (1, 2)
    assert found[0].overrides == ("methods.seq_len=[256]",)
