"""The example of context extension, run with everything small."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from ringattn.launch.config_check import check_config, resolve_model
from ringattn.launch.config_load import dump_config, load_config
from tests.launch.corpora import random_texts, write_jsonl

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "extend_context"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", FOLDER / "extend_context.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_configurations_are_of_one_model(example: ModuleType) -> None:
    names = ("lookup", "pretrain", "extend")
    lookup, first, second = (load_config(FOLDER / f"{name}.yaml") for name in names)
    for config in (lookup, first, second):
        check_config(config)
    assert resolve_model(lookup, 257) == resolve_model(first, 257)
    assert first.checkpoint.weights == lookup.run.dir
    scaled = load_config(FOLDER / "pretrain.yaml", example.SCALED)
    assert resolve_model(second, 257) == resolve_model(scaled, 257)
    assert replace(resolve_model(second, 257), rope_scaling=None) == resolve_model(first, 257)
    assert second.checkpoint.weights == first.run.dir
    assert first.data.longest == 2048
    assert second.data.seq_len == 16384


def test_it_runs(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, at a hundredth of the lengths."""
    monkeypatch.chdir(tmp_path)
    texts = write_jsonl(tmp_path / "t.jsonl", random_texts(60, 0, longest=300))
    example.run("prepare", str(texts), "--out", str(example.DATA / "text"), "--holdout", "0.3")
    small = ["--tokens", "2000", "--shortest", "32", "--longest", "96", "--every", "1"]
    monkeypatch.setattr(example, "CORPORA", dict.fromkeys(example.CORPORA, small))
    monkeypatch.setattr(example, "LENGTHS", "300,600")
    example.make_corpora()
    shrunk = {"lookup": [], "pretrain": [], "extend": ["data.curriculum=[[0,128],[1,256]]"]}
    for name, overrides in shrunk.items():
        common = ["train.steps=2", "train.eval_packs=1", "train.warmup_steps=0"]
        config = load_config(FOLDER / f"{name}.yaml", [*overrides, *common])
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
        example.run("train", str(tmp_path / f"{name}.yaml"), "data.seq_len=256")
    found = {name: example.evaluate(name, 1, tmp_path) for name in example.TESTS}
    example.plot(found, tmp_path / "extension.png")
    assert (tmp_path / "extension.png").stat().st_size > 10_000
    scaled = json.loads((tmp_path / "scaled.json").read_text())
    assert scaled["rope_scaling"]["kind"] == "yarn"
    assert found["pretrained"]["rope_scaling"] is None
