"""The command: exit codes, one line per mistake, ranks that end together."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringattn.benchmarks.soak_processes import alive, ranks_of
from ringattn.launch import failure, train
from ringattn.launch.config_load import config_from_values, load_config
from ringattn.launch.main import main
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.prepare import prepare
from ringattn.launch.train import check_before_start
from tests.launch.training import (
    command,
    finish,
    run_command,
    tiny_values,
    train_pooled,
    uneven_corpus,
    write_config,
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)


def one_line(text: str) -> str:
    """The single line that a mistake must print."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("ringattn: ")]
    assert len(lines) == 1, text
    return lines[0]


def _cut_shard(corpus: Path) -> None:
    shard = next(corpus.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])


def _remove(pattern: str) -> Callable[[Path], None]:
    return lambda corpus: next(corpus.glob(pattern)).unlink()


def _overwrite(name: str, text: str) -> Callable[[Path], None]:
    def spoil(corpus: Path) -> None:
        (corpus / name).write_text(text)

    return spoil


def _nothing(_: Path) -> None:
    pass


BAD_RUNS: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "no corpus": (_nothing, {"data.path": "/nowhere"}, "holds no prepared corpus"),
    "no source": (
        _nothing, {"data.path": "/tmp/nowhere/x", "data.source": "/nowhere"}, "/nowhere"
    ),
    "corpus without description": (_remove("meta.json"), {}, "holds no prepared corpus"),
    "corpus of another version": (_overwrite("meta.json", '{"format_version": 9}'), {}, "format"),
    "corpus description broken": (_overwrite("meta.json", "{"), {}, "not JSON"),
    "corpus shard truncated": (_cut_shard, {}, "truncated"),
    "corpus shard missing": (_remove("train-*.bin"), {}, "is missing"),
    "corpus index missing": (_remove("train-*.idx.npy"), {}, "is missing"),
    "unknown method": (_nothing, {"attention.method": "rnig"}, "attention.method=rnig"),
    "unknown layout": (_nothing, {"attention.layout": "zagzig"}, "attention.layout=zagzig"),
    "unknown kernel": (_nothing, {"attention.kernel": "fa9"}, "attention.kernel=fa9"),
    "no GPU": (_nothing, {"run.device": "cuda"}, "needs one GPU per rank"),
    "no such checkpoint": (
        _nothing, {"checkpoint.resume": "/nowhere"}, "checkpoint.resume=/nowhere"
    ),
    "wire dtype wider than the inputs": (
        _nothing, {"attention.wire_dtype": "bf16"}, "wire_dtype"
    ),
    "heads of 512": (_nothing, {"model.head_dim": 512}, "head_dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs(
    case: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused in this process, before any rank starts and before the run folder exists."""
    spoil, values, words = BAD_RUNS[case]
    copy = shutil.copytree(corpus, tmp_path / "copy")
    spoil(copy)
    config = write_config(
        tmp_path / "config.yaml", tiny_values(copy, tmp_path / "run", parallel__cp=2) | values
    )
    assert main(["train", str(config)]) == 2
    assert words in one_line(capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


BAD_COMMANDS = {
    "no config": (["train", "none.yaml"], "no such file"),
    "bad override": (["train", "{config}", "train.stesp=3"], "did you mean train.steps"),
    "prepare nothing": (["prepare", "{tmp}/none", "--out", "{tmp}/out"], "none"),
    "prepare an empty folder": (["prepare", "{tmp}/empty", "--out", "{tmp}/out"], "no document"),
    "prepare over something": (["prepare", "stdlib", "--out", "{tmp}/full"], "not empty"),
    "prepare with no tokenizer": (
        ["prepare", "stdlib", "--out", "{tmp}/out", "--tokenizer", "{tmp}/none"], "tokenizer"
    ),
    "prepare with a bad share": (
        ["prepare", "stdlib", "--out", "{tmp}/out", "--holdout", "2"], "holdout"
    ),
    "sample of nothing": (["sample", "{tmp}/none", "--prompt", "a"], "no model.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands(
    case: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD_COMMANDS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    config = write_config(tmp_path / "config.yaml", tiny_values(corpus, tmp_path / "run"))
    filled = [word.format(tmp=tmp_path, config=config) for word in arguments]
    assert main(filled) == 2
    assert words in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["sample", "run"], ["train", "a", "--gpu"]]
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ringattn" in capsys.readouterr().err


BAD_VARIABLES = {
    "rank without world": ({"RANK": "0"}, "WORLD_SIZE"),
    "rank that is no number": ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK=a"),
    "rank beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
}


@pytest.mark.parametrize("case", BAD_VARIABLES)
def test_bad_launcher_variables(
    case: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    variables, words = BAD_VARIABLES[case]
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    config = write_config(tmp_path / "config.yaml", tiny_values(corpus, tmp_path / "run"))
    assert main(["train", str(config)]) == 2
    assert words in one_line(capfd.readouterr().err)


def test_the_launcher_restarts_its_own_ranks(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """``--max-restarts`` behind torchrun would be ignored: it is refused, by the first rank."""
    monkeypatch.setattr(failure, "REPORT_GRACE_S", 0.0)
    monkeypatch.setattr(train, "REPORT_GRACE_S", 0.0)
    config = write_config(tmp_path / "config.yaml", tiny_values(corpus, tmp_path / "run"))
    lines = []
    for rank in "01":
        variables = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
        for key, value in (variables | {"TORCHELASTIC_RUN_ID": "x"}).items():
            monkeypatch.setenv(key, value)
        assert main(["train", str(config), "--max-restarts", "2"]) == 2
        lines.append(capfd.readouterr().err)
    assert "--max-restarts 2: restarts ranks that this command starts" in one_line(lines[0])
    assert lines[1] == ""
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_several_processes_is_told_once(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(failure, "REPORT_GRACE_S", 0.0)
    config = write_config(tmp_path / "config.yaml", tiny_values(corpus, tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command_line in (["train", str(config), "--launcher", "none"], ["doctor", "--ranks", "9"]):
        said = []
        for rank in "01":
            for key in ("RANK", "LOCAL_RANK"):
                monkeypatch.setenv(key, rank)
            for key, value in (("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
                monkeypatch.setenv(key, value)
            assert main(command_line) == 2
            said.append(capfd.readouterr().err)
        assert command_line[-2] in one_line(said[0])
        assert said[1] == ""


CHANGES = {
    "seed": {"seed": 8},
    "model.layers": {"model.layers": 1},
    "model.kv_heads": {"model.kv_heads": 1},
    "data.seq_len": {"data.seq_len": 96},
    "train.steps": {"train.steps": 1},
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_checkpoint_of_another_run(
    key: str, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(corpus, tmp_path / "run", train__steps=2)
    train_pooled(values)
    config = write_config(tmp_path / "config.yaml", values | CHANGES[key])
    assert main(["train", str(config)]) == 2
    line = one_line(capfd.readouterr().err)
    assert line.startswith(f"ringattn: {key}=")
    assert "step-000002" in line


def test_one_rank_trains_and_samples_in_process(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    values = tiny_values(corpus, run_dir, train__steps=3, train__deterministic=True)
    config = write_config(tmp_path / "config.yaml", values)
    assert main(["train", str(config), "train.steps=2"]) == 0
    out, err = capfd.readouterr()
    assert "held-out loss" in out
    assert "unigram entropy" in out
    assert "step 2/2" in err
    for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "loss.png", "summary.json"):
        assert (run_dir / name).is_file()
        assert str(run_dir) in out
    assert list((run_dir / "tensorboard").iterdir())
    assert load_config(run_dir / "config.yaml").train.steps == 2
    keys = {"step", "loss", "tokens", "step_s", "tokens_per_s", "grad_norm", "lr", "mfu", "degrees"}
    keys |= {"fault", "slowest_rank", "slowest_ratio"}
    for line in read_lines(run_dir / METRICS_FILE):
        assert set(line) == keys
        assert line["tokens"] == 160
        assert line["mfu"] is None
    assert main(["sample", str(run_dir), "--prompt", "the ", "--tokens", "5", "--seed", "3"]) == 0
    assert capfd.readouterr().out.startswith("the ")
    # From the folder's own configuration, two steps further.
    assert main(["train", str(run_dir / "config.yaml"), "train.steps=4"]) == 0
    assert [line["step"] for line in read_lines(run_dir / METRICS_FILE)] == [1, 2, 3, 4]


def test_dry_run_starts_nothing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=4)
    config = write_config(tmp_path / "config.yaml", values)
    assert main(["train", str(config), "train.steps=9", "--dry-run"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml").train.steps == 9
    assert not (tmp_path / "run").exists()


def test_a_missing_corpus_is_prepared_from_its_source(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_text(f"text number {i} " * 10)
    values = tiny_values(tmp_path / "new" / "corpus", tmp_path / "run") | {
        "data.source": str(source)
    }
    check_before_start(config_from_values(values))
    assert "prepared" in capfd.readouterr().err
    check_before_start(config_from_values(values))
    assert capfd.readouterr().err == ""


def test_torchrun_with_another_world_size(corpus: Path, tmp_path: Path) -> None:
    """Every rank refuses; one of them says so."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=3)
    config = write_config(tmp_path / "config.yaml", values)
    code, _, err = run_command("train", str(config), launcher=(*TORCHRUN, "--nproc-per-node=2"))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("ringattn: ")]
    assert len(said) == 1
    assert "parallel.cp=3: must divide the launcher's world size 2" in said[0]
    assert not (tmp_path / "run").exists()


def test_a_mistake_found_by_one_rank_is_said_once(corpus: Path, tmp_path: Path) -> None:
    """A bad token that only the second dp rank reads: one line, exit code 2, no rank left."""
    source = tmp_path / "texts.txt"
    source.write_text("x" * 639)
    broken = tmp_path / "corpus"
    prepare(source, broken, holdout=0.0)
    shard = next(broken.glob("train-*.bin"))
    tokens = bytearray(shard.read_bytes())
    tokens[2 * 200 : 2 * 200 + 2] = b"\xff\xff"
    shard.write_bytes(tokens)
    values = tiny_values(broken, tmp_path / "run", parallel__dp=2)
    config = write_config(tmp_path / "config.yaml", values)
    code, _, err = run_command("train", str(config))
    assert code == 2, err
    line = one_line(err)
    assert "token 200" in line
    assert "65535" in line


def test_an_interrupt_ends_every_rank(corpus: Path, tmp_path: Path) -> None:
    values = tiny_values(
        corpus, tmp_path / "run", parallel__cp=2, train__steps=100_000, train__log_every=1
    )
    process = command("train", str(write_config(tmp_path / "config.yaml", values)))
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("step 2/"))
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 128 + signal.SIGINT
    assert "stopped by SIGINT" in one_line(err)
    assert not any(alive(rank) for rank in ranks)


def test_a_killed_rank_ends_the_others(corpus: Path, tmp_path: Path) -> None:
    values = tiny_values(
        corpus, tmp_path / "run", parallel__cp=2, train__steps=100_000, train__log_every=1
    )
    process = command("train", str(write_config(tmp_path / "config.yaml", values)))
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("step 2/"))
    ranks = ranks_of(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code in (1, 128 + signal.SIGKILL)
    assert "ringattn: rank " in err
    assert not any(alive(rank) for rank in ranks)


def test_a_loss_that_is_not_finite_ends_the_run(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    values = tiny_values(corpus, run_dir, train__lr=1e18, train__clip_norm=0.0)
    config = write_config(tmp_path / "config.yaml", values)
    assert main(["train", str(config), "checkpoint.every=1"]) == 2
    assert "step 2 must have a finite loss" in one_line(capfd.readouterr().err)
    assert [line["step"] for line in read_lines(run_dir / METRICS_FILE)] == [1]


def test_a_fault_names_rank_and_step(corpus: Path, tmp_path: Path) -> None:
    """A rank that does not answer: the other one gives up after run.timeout_s and says where."""
    values = tiny_values(
        corpus,
        tmp_path / "run",
        parallel__cp=2,
        train__steps=100_000,
        train__log_every=1,
        run__timeout_s=6.0,
    )
    process = command("train", str(write_config(tmp_path / "config.yaml", values)))
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("step 2/"))
    stopped = ranks_of(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    report = [next(line for line in process.stderr if line.startswith("ringattn: "))]
    report.append(next(process.stderr))
    os.kill(stopped, signal.SIGKILL)
    code, _, _ = finish(process)
    assert code in (1, 128 + signal.SIGKILL)
    assert re.match(r"ringattn: rank \d on host \S+ \(pid \d+\) at step \d+, ", report[0])
    # Where it was last heard of may be a moment before the step.
    assert re.match(r"ringattn: rank \d on host \S+ .* did not answer", report[1])
