"""Every engine trains alike: losses and gradient norms in float32, whatever is sharded and how."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from ringattn.errors import UserError
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values
from ringattn.launch.prepare import prepare
from tests.launch.corpora import write_jsonl
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus
from tests.pairwise import pairwise

# The first run in each pool of ranks imports DeepSpeed and half of torch.
pytestmark = pytest.mark.timeout(300)
STEPS = 30
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel.engine": "fsdp"},
    "zero 1": {"parallel.engine": "deepspeed", "parallel.zero_stage": 1},
    "zero 2": {"parallel.engine": "deepspeed", "parallel.zero_stage": 2},
    "zero 3": {"parallel.engine": "deepspeed", "parallel.zero_stage": 3},
}
OFFLOADS = {
    "fsdp": ("parameters",),
    "zero 1": ("optimizer",),
    "zero 2": ("optimizer",),
    "zero 3": ("optimizer", "parameters"),
}
AXES: dict[str, list] = {"engine": list(ENGINES), "cp": [1, 2, 4], "dp": [1, 2]}
PRODUCT: dict[str, list] = {
    **AXES,
    "accumulate": [1, 3],
    "offload": ["none", "optimizer", "parameters"],
    "reshard": [True, False],
    "clip": [1.0, 0.0],
}
CASES = pairwise(AXES, lambda case: case["cp"] * case["dp"] <= 4)
MORE_CASES = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def allowed(case: dict[str, Any]) -> bool:
    """Combinations that the configuration takes, and that differ."""
    engine, offload = case["engine"], case["offload"]
    return (offload == "none" or offload in OFFLOADS[engine]) and (
        engine == "fsdp" or case["reshard"]
    )


def case_name(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


def case_values(case: dict[str, Any]) -> dict[str, Any]:
    """Dotted values of a case."""
    keys = {
        "cp": "parallel.cp",
        "dp": "parallel.dp",
        "accumulate": "train.accumulate",
        "offload": "parallel.offload",
        "reshard": "parallel.reshard",
        "clip": "train.clip_norm",
    }
    values = {keys[axis]: value for axis, value in case.items() if axis in keys}
    return ENGINES[case["engine"]] | values


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of one replicated rank; each is made once."""
    runs: dict[Any, list[dict[str, Any]]] = {}

    def run(
        packs: int, clip: float = 1.0, steps: int = STEPS, tied: bool = True
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


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_parity(case: dict[str, Any], corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", train__steps=STEPS) | case_values(case)
    assert_parity(one_rank(case["dp"]), train_pooled(values))


@pytest.mark.parametrize(
    "engine, offload", [(name, offload) for name in OFFLOADS for offload in OFFLOADS[name]]
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
        train__steps=6,
        train__accumulate=3,
        train__clip_norm=0.0,
    )
    assert_parity(one_rank(3, 0.0, 6), train_pooled(values | ENGINES[engine]))


@pytest.mark.full
@pytest.mark.parametrize("case", [*MORE_CASES, *pairwise(PRODUCT, allowed)], ids=case_name)
def test_parity_of_more(case: dict[str, Any], corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", train__steps=STEPS) | case_values(case)
    expected = one_rank(case["dp"] * case.get("accumulate", 1), case.get("clip", 1.0))
    assert_parity(expected, train_pooled(values))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_of_its_own(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    values |= {"model.tie_embeddings": False}
    got = train_pooled(values | ENGINES[engine])
    assert_parity(one_rank(1, tied=False)[:4], got)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mean_in_place_of_the_sum_is_seen(
    engine: str, corpus: Path, one_rank: Any, tmp_path: Path
) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=3)
    got = train_pooled(values | ENGINES[engine], "average sharded gradients")
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_parity(one_rank(1)[:3], got)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_with_no_tokens(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=4)
    got = train_pooled(values | ENGINES[engine], "a rank with no tokens")
    assert_parity(one_rank(1)[:4], got)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_without_counted_tokens(engine: str, tmp_path: Path) -> None:
    """One-character documents dealt in turn: the second rank owns only ends of documents."""
    source = write_jsonl(tmp_path / "texts.jsonl", list("abcdefghijklmnopqrstuvwxyz"))
    corpus = tmp_path / "corpus"
    prepare(source, corpus, holdout=0.0)
    shape = {"data__seq_len": 8, "train__steps": 6, "attention__layout": "striped"}
    expected = train_pooled(tiny_values(corpus, tmp_path / "one", **shape))
    values = tiny_values(corpus, tmp_path / "two", **shape, parallel__cp=2) | ENGINES[engine]
    assert_parity(expected, train_pooled(values))


@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_stays_close(engine: str, corpus: Path, one_rank: Any, tmp_path: Path) -> None:
    values = tiny_values(
        corpus, tmp_path / "run", parallel__cp=2, train__dtype="bf16", train__steps=12
    )
    got = train_pooled(values | ENGINES[engine])
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
