"""The same training whatever the mesh: losses and gradient norms of 20 steps in float32."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.metrics import EVAL_FILE, METRICS_FILE, read_lines
from ringattn.launch.prepare import prepare
from tests.launch.corpora import write_jsonl
from tests.launch.training import (
    assert_parity,
    run_command,
    tiny_values,
    train_pooled,
    uneven_corpus,
    write_config,
)

MESHES = {
    "cp2": {"parallel.cp": 2},
    "cp4": {"parallel.cp": 4},
    "cp2 contiguous ring": {
        "parallel.cp": 2, "attention.method": "ring", "attention.layout": "contiguous"
    },
    "cp4 striped": {"parallel.cp": 4, "attention.layout": "striped"},
}  # fmt: skip
MESHES_OF_TWO_PACKS = {
    "accumulate 2": {"train.accumulate": 2},
    "cp2 accumulate 2": {"parallel.cp": 2, "train.accumulate": 2},
    "dp2": {"parallel.dp": 2},
    "dp2 cp2": {"parallel.dp": 2, "parallel.cp": 2},
}
MISTAKES = (
    "divide by the local count",
    "average gradients",
    "shift after sharding",
    "local positions",
    "clip before the sum",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """20 steps of one pack each on one rank."""
    return train_pooled(tiny_values(corpus, tmp_path_factory.mktemp("one") / "run"))


@pytest.mark.parametrize("mesh", MESHES)
def test_one_pack_per_step(
    mesh: str, corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert_parity(one_rank, train_pooled(tiny_values(corpus, tmp_path / "run") | MESHES[mesh]))


@pytest.mark.gpu
def test_ranks_that_share_a_gpu(
    corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, run__device="cuda_shared")
    assert_parity(one_rank, train_pooled(values), tolerance=1e-2)


def test_two_packs_per_step(corpus: Path, tmp_path: Path) -> None:
    """Accumulation and data parallelism read the same packs: 1 × 2 = 2 × 1, with and without cp."""
    runs = {
        name: train_pooled(tiny_values(corpus, tmp_path / name) | mesh)
        for name, mesh in MESHES_OF_TWO_PACKS.items()
    }
    expected = runs.pop("accumulate 2")
    for got in runs.values():
        assert_parity(expected, got)
    evaluations = [read_lines(tmp_path / name / EVAL_FILE)[-1] for name in MESHES_OF_TWO_PACKS]
    assert len({line["tokens"] for line in evaluations}) == 1
    for line in evaluations:
        assert line["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-5)


def test_a_rank_with_no_tokens(
    corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=4)
    assert_parity(one_rank, train_pooled(values, "a rank with no tokens"))


def test_ranks_without_counted_tokens(tmp_path: Path) -> None:
    """One-character documents dealt in turn: the second rank owns only ends of documents."""
    source = write_jsonl(tmp_path / "texts.jsonl", list("abcdefghijklmnopqrstuvwxyz"))
    corpus = tmp_path / "corpus"
    prepare(source, corpus, holdout=0.0)
    shape = {"data__seq_len": 8, "train__steps": 6, "attention__layout": "striped"}
    expected = train_pooled(tiny_values(corpus, tmp_path / "one", **shape))
    got = train_pooled(tiny_values(corpus, tmp_path / "two", **shape, parallel__cp=2))
    assert_parity(expected, got)


@pytest.mark.parametrize("mutation", [None, *MISTAKES])
def test_mistakes_are_seen(
    mutation: str | None, corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A deliberately broken trainer must fail the comparison; without a mistake it passes."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    got = train_pooled(values, mutation)
    expectation = pytest.raises(AssertionError) if mutation else contextlib.nullcontext()
    with expectation:
        assert_parity(one_rank[:4], got)


def test_bfloat16_learns(corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__dtype="bf16")
    got = train_pooled(values)
    assert_parity(one_rank[:1], got[:1], tolerance=1e-2)
    assert got[-1]["loss"] < got[0]["loss"] - 0.5


@pytest.mark.full
def test_command_and_torchrun_agree_bitwise(
    corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The real command on its own ranks, and under torchrun."""
    losses = []
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name, launcher in {"alone": (), "torchrun": torchrun}.items():
        values = tiny_values(
            corpus, tmp_path / name, parallel__cp=2, train__deterministic=True, train__profile="1:2"
        )
        config = write_config(tmp_path / f"{name}.yaml", values)
        code, out, err = run_command("train", str(config), launcher=launcher)
        assert code == 0, err
        assert "held-out loss" in out
        lines = read_lines(tmp_path / name / METRICS_FILE)
        assert_parity(one_rank, lines)
        losses.append([line["loss"] for line in lines])
        trace = (tmp_path / name / "profile" / "rank1.json").read_text()
        assert "traceEvents" in trace
    assert losses[0] == losses[1]
