"""Reading, overriding, dumping and refusing configurations."""

from pathlib import Path
from typing import Any

import pytest

from ringattn.errors import UserError
from ringattn.launch.config import Config, TrainConfig
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_fields, config_from_values, dump_config, load_config
from ringattn.launch.idle_settings import idle_settings
from ringattn.launch.schedule import learning_rate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_text


def test_file_and_overrides(write: Any) -> None:
    path = write("seed: 3\ntrain: {steps: 5, lr: 1e-3}\nrun: {dir: a}\nmodel:\n")
    config = load_config(
        path, ["train.steps=7", "run.dir=2024", "model.layers=null", "train.betas=[0.9, 0.99]"]
    )
    assert config.seed == 3
    assert config.train.steps == 7
    assert config.train.lr == 1e-3
    assert config.run.dir == "2024"
    assert config.model.layers is None
    assert config.train.betas == (0.9, 0.99)


def test_an_empty_file_is_the_default(write: Any) -> None:
    assert load_config(write("")) == Config()


def test_dump_can_be_loaded_again(write: Any) -> None:
    config = config_from_values(
        {"seed": 2, "model.layers": 3, "train.betas": [0.8, 0.9], "train.profile": "1:2",
         "run.name": "null", "attention.wire_dtype": "bf16"}
    )  # fmt: skip
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    check_config(load_config(path))


def test_keys_that_scripts_rely_on() -> None:
    promised = """seed run.dir run.timeout_s data.path data.seq_len
        model.size model.layers model.dim model.heads model.kv_heads model.head_dim
        parallel.cp parallel.dp attention.method attention.layout attention.kernel
        train.steps train.dtype train.accumulate train.deterministic train.threads_per_rank
        checkpoint.every checkpoint.resume"""
    assert set(promised.split()) <= set(config_fields())


BAD_FILES = {
    "a tag that runs code": (
        "run: !!python/object/apply:os.system ['touch ran']", "line 1: tag .*os.system.*refused"
    ),
    "a tag in a sequence": ("train: {betas: [!!python/name:os.getcwd '', 1]}", "tag .*refused"),
    "a key given twice": ("seed: 1\nseed: 2", "line 2.*'seed' is given twice"),
    "a section given twice": ("run: {dir: a}\nrun: {dir: b}", "'run' is given twice"),
    "broken YAML": ("run: {dir: a", "not valid YAML"),
    "a list": ("- run", "must be a mapping"),
    "a section that is a value": ("run: 3", "run=3: run is a section"),
    "a key that is a number": ("1: 2", "not text"),
    "an unknown section": ("trian: {steps: 3}", "trian.*unknown"),
    "an unknown key": ("train: {stesp: 3}", "train.stesp: unknown; did you mean train.steps"),
    "a number for text": ("run: {dir: 3}", "run.dir=3: must be text"),
    "deep nesting": ("[" * 5000, "not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2", "not valid YAML"),
    "a tab": ("run:\n\tdir: a", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, write: Any, tmp_path: Path, monkeypatch: Any) -> None:
    text, words = BAD_FILES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_config(write(text))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


BAD_OVERRIDES = {
    "train.steps": "not of the form key=value",
    "=3": "not of the form key=value",
    "train=3": "train is a section",
    "cp=2": "did you mean parallel.cp",
    "parallel.pp=2": "unknown",
    "train.steps=many": "train.steps=many: must be an integer",
    "train.steps=1.5": "must be an integer",
    "train.steps=true": "must be an integer",
    "train.steps=null": "must be an integer",
    "train.lr=[1]": "must be a number",
    "train.deterministic=1": "must be true or false",
    "train.dtype=fp8": "train.dtype=fp8: must be one of fp32, bf16",
    "train.betas=0.9": "must be a list of 2 numbers",
    "train.betas=[0.9, a]": "must be a number",
    "run.device=tpu": "must be one of auto, cpu, cuda",
    "train.lr=!!python/object/apply:os.getcwd []": "tag .*refused",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_overrides(override: str, write: Any) -> None:
    with pytest.raises(UserError, match=BAD_OVERRIDES[override]):
        load_config(write(""), [override])


BAD_VALUES = {
    "seed=-1": "seed=-1: must be at least 0",
    "parallel.cp=0": "parallel.cp=0: must be at least 1",
    "parallel.dp=-2": "must be at least 1",
    "parallel.cp=9000": "must not exceed data.seq_len=8192",
    "parallel.ranks_per_node=2": "must be at most the dp × cp = 1 × 1 ranks",
    "data.seq_len=1": "must be at least 2",
    "train.steps=0": "must be at least 1",
    "train.accumulate=0": "must be at least 1",
    "train.threads_per_rank=0": "must be at least 1",
    "train.lr=0": "must be positive",
    "train.lr=.nan": "must be positive",
    "train.min_lr=1.0": "must not exceed train.lr",
    "train.weight_decay=.inf": "must be at least 0",
    "train.betas=[0.9, 1.0]": "in \\[0, 1\\)",
    "train.profile=5": "START:STOP",
    "train.profile=3:3": "START:STOP",
    "train.profile=0:2000": "START:STOP",
    "run.timeout_s=0": "must be positive",
    "run.dir=": "must name a folder",
    "run.dir=/dev/null/run": "is a file, not a folder",
    "checkpoint.every=-1": "must be at least 0",
    "model.size=13b": "model.size='13b'",
    "model.kv_heads=3": "must be a multiple of model.kv_heads=3",
    "model.head_dim=7": "must be even",
    "model.layers=0": "must be positive",
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_bad_values(override: str, write: Any) -> None:
    config = load_config(write(""), [override])
    with pytest.raises(UserError, match=BAD_VALUES[override]) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["on_nonfinite", "on_spike"])
def test_a_rollback_needs_checkpoints(key: str) -> None:
    values = {f"faults.{key}": "rollback"}
    check_config(config_from_values(values | {"checkpoint.every": 10}))
    with pytest.raises(UserError, match=f"faults.{key}=rollback: needs checkpoints"):
        check_config(config_from_values(values))


def test_an_elastic_job_may_be_smaller_than_a_node() -> None:
    check_config(config_from_values({"parallel.ranks_per_node": 8, "parallel.elastic": True}))


IDLE = {
    "parallel.zero_stage=2": ("parallel.engine=fsdp", "parallel.engine=deepspeed"),
    "parallel.reshard=false": ("parallel.engine=ddp", "parallel.engine=fsdp"),
    "memory.recompute=0.5": ("memory.checkpointing=full", "memory.checkpointing=sequence"),
    "attention.refine=3": ("attention.cluster=null", "attention.cluster=h100_sxm"),
    "faults.spike_factor=3": ("faults.on_spike=ignore", "faults.on_spike=skip"),
    "faults.spike_window=9": ("faults.on_spike=ignore", "faults.on_spike=stop"),
    "faults.straggler_steps=9": ("faults.straggler_factor=0", "faults.straggler_factor=2"),
    "checkpoint.keep_every=5": ("checkpoint.keep=0", "checkpoint.keep=1"),
    "data.path=b": ("data.mixture={a: 1}", "data.mixture=null"),
}


@pytest.mark.parametrize("setting", IDLE)
def test_a_setting_without_effect_is_told(setting: str, write: Any) -> None:
    without, needed = IDLE[setting]
    (line,) = idle_settings(load_config(write(""), [setting, without]))
    assert line.startswith(f"{setting.split('=')[0]}=")
    assert "has no effect without" in line
    assert not idle_settings(load_config(write(""), [setting, needed]))
    assert not idle_settings(load_config(write(""), [without]))


def test_learning_rate_rises_and_falls() -> None:
    train = TrainConfig(steps=101, lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(train, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    short = TrainConfig(steps=3, lr=1.0, min_lr=0.1, warmup_steps=10)
    assert [learning_rate(short, step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
