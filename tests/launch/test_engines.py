"""What only engines differ in: offload, scaling, ranks without tokens, bfloat16, refusals."""

from pathlib import Path
from typing import Any

import pytest

from ringattn.errors import UserError
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.prepare import prepare
from tests.launch.corpora import write_jsonl
from tests.launch.engines import OFFLOADS, SHARDED
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one replicated rank; each is made once."""
    runs: dict[Any, list[dict[str, Any]]] = {}

    def run(
        packs: int, clip: float = 1.0, steps: int = 4, tied: bool = True
    ) -> list[dict[str, Any]]:
        key = (packs, clip, steps, tied)
        if key not in runs:
            folder = tmp_path_factory.mktemp("one") / "run"
            values = tiny_values(corpus, folder, train__steps=steps, train__accumulate=packs)
            runs[key] = train_pooled(
                values | {"train.clip_norm": clip, "model.tie_embeddings": tied}
            )
        return runs[key]

    return run


@pytest.mark.parametrize(
    "engine, offload", [(name, offload) for name in SHARDED for offload in OFFLOADS[name]]
)
def test_offload_accumulation_and_no_clipping(
    engine: str, offload: str, corpus: Path, one_rank: Any, tmp_path: Path
) -> None:
    values = tiny_values(
        corpus,
        tmp_path / "run",
        parallel__cp=2,
        parallel__offload=offload,
        parallel__reshard=False,
        train__steps=4,
        train__accumulate=3,
        train__clip_norm=0.0,
    )
    assert_parity(one_rank(3, 0.0), train_pooled(values | SHARDED[engine]))


@pytest.mark.parametrize("engine", SHARDED)
def test_a_head_of_its_own(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    values |= {"model.tie_embeddings": False}
    got = train_pooled(values | SHARDED[engine])
    assert_parity(one_rank(1, tied=False), got)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_mean_in_place_of_the_sum_is_seen(
    engine: str, corpus: Path, one_rank: Any, tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=3)
    got = train_pooled(values | SHARDED[engine], "average sharded gradients")
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_parity(one_rank(1)[:3], got)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_rank_with_no_tokens(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    got = train_pooled(values | SHARDED[engine], "a rank with no tokens")
    assert_parity(one_rank(1), got)


@pytest.mark.parametrize("engine", SHARDED)
def test_ranks_without_counted_tokens(engine: str, tmp_path: Path) -> None:
    """One-character documents dealt in turn: the second rank owns only ends of documents."""
    source = write_jsonl(tmp_path / "texts.jsonl", list("abcdefghijklmnopqrstuvwxyz"))
    corpus = tmp_path / "corpus"
    prepare(source, corpus, holdout=0.0)
    shape = {"data__seq_len": 8, "train__steps": 6, "attention__layout": "striped"}
    expected = train_pooled(tiny_values(corpus, tmp_path / "one", **shape))
    values = tiny_values(corpus, tmp_path / "two", **shape, parallel__cp=2) | SHARDED[engine]
    assert_parity(expected, train_pooled(values))


@pytest.mark.parametrize("engine", SHARDED)
def test_bfloat16_stays_close(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(
        corpus, tmp_path / "run", parallel__cp=2, train__dtype="bf16", train__steps=12
    )
    got = train_pooled(values | SHARDED[engine])
    expected = one_rank(1, steps=12)
    assert_parity(expected[:1], got[:1], tolerance=1e-2)
    for have, want in zip(got, expected, strict=True):
        assert abs(have["loss"] - want["loss"]) < 2e-3 * want["loss"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"parallel.zero_stage": 4}, "zero_stage=4 must be 1, 2 or 3"),
        ({"parallel.zero_stage": 0}, "zero_stage=0 must be at least 1"),
        ({"parallel.offload": "optimizer"}, "offload=optimizer needs a sharded engine"),
        (
            {"parallel.engine": "fsdp", "parallel.offload": "optimizer"},
            "engine=fsdp keeps an optimizer where",
        ),
        (
            {
                "parallel.engine": "deepspeed",
                "parallel.zero_stage": 2,
                "parallel.offload": "parameters",
            },
            "needs sharded parameters, not parallel.zero_stage=2",
        ),
        (
            {"parallel.engine": "fsdp", "run.device": "cuda_shared"},
            "engine=fsdp needs a GPU for each rank",
        ),
    ],
)
def test_impossible_combinations_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_config(config_from_values(wrong))
    assert message in str(caught.value).replace(": ", " ")


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringattn.parallel.zero.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ringattn\[deepspeed\]'"):
        check_config(config_from_values({"parallel.engine": "deepspeed"}))
    check_config(config_from_values({"parallel.engine": "fsdp"}))
