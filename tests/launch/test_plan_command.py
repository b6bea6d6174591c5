"""``ringattn plan``: its table, its JSON, its files, its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.main import main
from tests.launch.training import tiny_values, uneven_corpus, write_config

KEYS = {"candidates", "choice", "predicted", "reason"}
CANDIDATE_KEYS = {
    "method", "layout", "u", "forward_s", "backward_s", "tflops_per_gpu", "bytes_mean",
    "bytes_max", "imbalance", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> str:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=4)
    return str(write_config(tmp_path / "config.yaml", values))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """JSON and notes of ``ringattn plan ARGUMENTS --json``."""
    assert main(["plan", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_json(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, notes = planned(capsys, config, "--cluster", "h100_sxm")
    assert set(found) == KEYS
    assert all(set(row) == CANDIDATE_KEYS for row in found["candidates"])
    assert "first pack of" in notes
    assert "h100_sxm" in notes
    seconds = [row["forward_s"] + row["backward_s"] for row in found["candidates"]]
    assert found["predicted"] == min(seconds)
    assert seconds == sorted(seconds)
    first = found["candidates"][0]
    assert found["choice"] == {key: first[key] for key in ("method", "layout", "u")}
    names = [(row["layout"], row["method"], row["u"]) for row in found["candidates"]]
    assert len(set(names)) == len(names)
    for row in found["candidates"]:
        for lane in ("intra", "inter"):
            assert 0 <= row["bytes_mean"][lane] <= row["bytes_max"][lane]
        assert row["imbalance"] >= 1
        assert row["tflops_per_gpu"] > 0
    assert found["choice"]["method"] in found["reason"]
    assert not (tmp_path / "run").exists()
    assert planned(capsys, config, "--cluster", "h100_sxm")[0] == found


def test_table_names_cluster_choice_and_refusals(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, "attention.cluster=a100_sxm"]) == 0
    out, err = capsys.readouterr()
    assert "cluster a100_sxm" in out
    assert "\nchoice: " in out
    assert not err


def test_default_cluster_is_stated(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu, name in ((False, "cpu_gloo"), (True, "h100_sxm")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert main(["plan", config]) == 0
        assert f"cluster {name}" in capsys.readouterr().out


def test_without_a_corpus_a_causal_mask_is_planned(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Overrides may stand before and after options.
    found, notes = planned(
        capsys, config, "data.path=/nowhere", "--cluster", "cpu_gloo", "data.seq_len=512"
    )
    assert "is not prepared: planning a causal mask of 512 tokens" in notes
    assert found["candidates"]


def test_pictures_and_trace(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, trace = tmp_path / "new" / "pictures", tmp_path / "trace.json"
    planned(capsys, config, "--pictures", str(folder), "--trace", str(trace))
    for name in ("mask.png", "work.png", "timeline.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]


BAD = {
    "unknown cluster": (["--cluster", "h1000"], "cluster=h1000"),
    "unknown cluster in the config": (["attention.cluster=h1000"], "cluster=h1000"),
    "cluster file of something else": (["--cluster", "{config}"], "unknown"),
    "unknown method": (["attention.method=rnig"], "rnig"),
    "trace into nothing": (["--trace", "/nowhere/trace.json"], "/nowhere/trace.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_end_with_one_line(
    case: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, words = BAD[case]
    assert main(["plan", config, *(word.format(config=config) for word in extra)]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("ringattn: ")]
    assert len(lines) == 1, err
    assert words in lines[0]


def test_a_bad_cluster_stops_training(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", config, "attention.cluster=h1000", "--dry-run"]) == 2
    assert "cluster=h1000" in capsys.readouterr().err


def test_settings_of_the_method(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ("attention.layout=contiguous", "attention.method=usp", "attention.u=2")
    plain, _ = planned(capsys, config, *fixed, "--cluster", "h100_sxm")
    assert {row["u"] for row in plain["candidates"]} == {2}
    kept, _ = planned(capsys, config, *fixed, "attention.save=true", "--cluster", "h100_sxm")
    received = [sum(found["candidates"][0]["bytes_max"].values()) for found in (kept, plain)]
    assert received[0] < received[1]
    assert main(["plan", config, "attention.method=ring", "attention.u=2"]) == 2
    assert "method 'ring' has none" in capsys.readouterr().err


def test_layers_with_windows_are_priced_by_mask(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = ("model.layers=5", "model.window=20", "model.full_every=4", "--cluster", "h100_sxm")
    found, _ = planned(capsys, config, *stack)
    assert set(found) == KEYS | {"layers"}
    parts = {tuple(part["windows"]): part for part in found["layers"]}
    assert parts[(20,)]["layers"] == 4
    assert parts[(None,)]["layers"] == 1
    assert found["predicted"] in {part["predicted"] for part in parts.values()}
    assert len({part["choice"]["layout"] for part in parts.values()}) == 1
    assert main(["plan", config, *stack]) == 0
    out = capsys.readouterr().out
    total = sum(part["layers"] * part["predicted"] for part in parts.values())
    assert "4 layers of a window of 20, on the stack's layout" in out
    assert "1 layers of whole documents, on" in out
    assert f" = {1e3 * total:.4g} ms" in out
    # A window that no document exceeds is no mask of its own.
    alike, _ = planned(capsys, config, "model.window=5000", "model.full_every=2")
    assert set(alike) == KEYS


def test_the_first_step_at_several_degrees(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    degrees = ("parallel.min_cp=1", "train.accumulate=4", "--cluster", "h100_sxm")
    step = planned(capsys, config, *degrees)[0]["step"]
    # Packs of 160 tokens are all latency: each rank takes a pack of its own.
    assert step["degrees"] == [1]
    assert step["gain"] == pytest.approx(1 - step["step_s"] / step["plain_step_s"])
    assert step["gain"] > 0.02
    assert main(["plan", config, *degrees]) == 0
    assert "the first step's 4 packs: rounds x degree 1x1, " in capsys.readouterr().out
