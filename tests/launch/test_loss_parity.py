"""One grid: whatever is sharded, kept, recomputed or compiled, the losses are those of one device.

30 steps in float32 against one rank of the replicated engine that keeps everything: losses and
gradient norms. Pairs of settings in the short tests, a sample of all combinations behind `full`.
"""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.degrees import degrees_of
from tests.grid import run_grid
from tests.launch.engines import ENGINES, OFFLOADS, SHARDED
from tests.launch.mixed_rounds import use_changing_rounds
from tests.launch.training import (
    assert_parity,
    graphs_without_a_compiler,
    parity_errors,
    tiny_values,
    train_pooled,
    uneven_corpus,
)
from tests.pairwise import drawn_pairwise, pairwise

TOLERANCE = 1e-5
SOURCES = ("ringattn", "kernels", "parallel", "launch")
Case = dict[str, Any]
Lines = list[dict[str, Any]]

# Where several cases cover as many pairs, the first values are taken.
AXES: dict[str, list] = {
    "engine": list(ENGINES),
    "parallel.cp": [2, 1, 4],
    "parallel.dp": [1, 2],
    "memory.checkpointing": ["full", "attention", "sequence", "none"],
    "train.compile": [False, True],
    "memory.token_tile": [37, None],
    "memory.offload": [True, False],
    "parallel.offload": ["none", "optimizer", "parameters"],
    "model.window": [24, None],
    "train.accumulate": [1, 2],
}


def allowed(case: Case) -> bool:
    """What the configuration takes."""
    offload = case["parallel.offload"]
    return (offload == "none" or offload in OFFLOADS[case["engine"]]) and not (
        case["memory.offload"] and case["memory.checkpointing"] == "none"
    )


def world_of(case: Case) -> int:
    return case["parallel.cp"] * case["parallel.dp"]


def quick(case: Case) -> bool:
    """Every rank compiles for itself, which takes long; one case does so on four ranks."""
    return world_of(case) <= (2 if case["train.compile"] else 4) or (
        case["engine"] == "zero 3" and case["parallel.cp"] == 4 and case["parallel.dp"] == 1
    )


CASES = pairwise(AXES, lambda case: quick(case) and allowed(case))

COMPILED_IN_EARNEST = ("fsdp", "zero 1")


def case_name(case: Case) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def values_of(corpus: Path, run: Path, window: int | None, **overrides: Any) -> dict[str, Any]:
    """30 steps; with a window every other layer attends everything."""
    shape = {"train__steps": 30, "train__eval_packs": 1}
    if window is not None:
        shape |= {"model__window": window, "model__full_every": 2}
    return tiny_values(corpus, run, **(shape | overrides))


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lines]:
    """Runs of one replicated rank that keeps everything; each is made once."""
    runs: dict[Any, Lines] = {}

    def run(packs: int, window: int | None, clip: float = 1.0) -> Lines:
        key = packs, window, clip
        if key not in runs:
            folder = tmp_path_factory.mktemp("one") / "run"
            values = values_of(
                corpus, folder, window, train__accumulate=packs, train__clip_norm=clip
            )
            runs[key] = train_pooled(values)
        return runs[key]

    return run


def train_case(case: Case, corpus: Path, run: Path, compiler: bool = False) -> Lines:
    """Trains a case; `compiler`: compiled code is made in earnest, not only traced."""
    rest = {key: value for key, value in case.items() if key != "engine"}
    values = values_of(corpus, run, case["model.window"]) | rest | ENGINES[case["engine"]]
    traced = case["train.compile"] and not compiler
    return train_pooled(values, graphs_without_a_compiler if traced else None)


def expected_of(case: Case, one_rank: Callable[..., Lines]) -> Lines:
    packs = case["parallel.dp"] * case["train.accumulate"]
    return one_rank(packs, case["model.window"], case.get("train.clip_norm", 1.0))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_pairs_of_settings(
    case: Case, corpus: Path, one_rank: Callable[..., Lines], tmp_path: Path
) -> None:
    got = train_case(case, corpus, tmp_path / "run", case["engine"] in COMPILED_IN_EARNEST)
    assert_parity(expected_of(case, one_rank), got, TOLERANCE)


@pytest.mark.parametrize(
    "engine, cp, packs",
    [
        ("fsdp", 2, 3),
        ("zero 3", 2, 3),
        *(pytest.param(engine, 4, 8, marks=pytest.mark.full) for engine in SHARDED),
    ],
)
def test_changing_degrees(
    engine: str, cp: int, packs: int, corpus: Path, one_rank: Callable[..., Lines], tmp_path: Path
) -> None:
    """Packs of a step on different numbers of ranks, in another way in every step."""
    values = values_of(
        corpus, tmp_path / "run", 24, parallel__cp=cp, parallel__min_cp=1, train__accumulate=packs
    )
    values |= {
        "attention.cluster": "cpu_gloo",
        "attention.method": "ring",
        "attention.layout": "zigzag",
    }
    got = train_pooled(values | ENGINES[engine], use_changing_rounds)
    assert_parity(one_rank(packs, 24), got, TOLERANCE)
    rounds = {tuple(line["degrees"]) for line in got}
    assert {degree for degrees in rounds for degree in degrees} == {*degrees_of(cp, 1)}
    assert len({len(degrees) for degrees in rounds}) > 1


# Everything, up to 8 ranks. Those of the drawn pairs come first.
PRODUCT = {**AXES, "parallel.reshard": [True, False], "train.clip_norm": [1.0, 0.0]}
SAMPLE = 300


def sample(seed: int) -> list[Case]:
    """Pairs that include 8 ranks, then combinations at random; each once."""

    def possible(case: Case) -> bool:
        return allowed(case) and (case["engine"] == "fsdp" or case["parallel.reshard"])

    draw, found = random.Random(seed), drawn_pairwise(PRODUCT, possible, seed)
    draw.shuffle(found)
    while len(found) < SAMPLE:
        case = {axis: draw.choice(values) for axis, values in PRODUCT.items()}
        if possible(case) and case not in found:
            found.append(case)
    return found


@pytest.mark.full
@pytest.mark.timeout(8 * 3600)
def test_sampled_settings(
    corpus: Path,
    one_rank: Callable[..., Lines],
    tmp_path: Path,
    grid_seconds: float | None,
    request: pytest.FixtureRequest,
) -> None:
    """Up to two ranks compile in earnest, more only trace."""
    seed = int(request.config.getoption("--seed") or 0)

    def check(case: Case) -> dict[str, float]:
        run = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
        got = train_case(case, corpus, run, world_of(case) <= 2)
        return parity_errors(expected_of(case, one_rank), got)

    run_grid(
        "loss_parity",
        sample(seed),
        check,
        tolerance=TOLERANCE,
        folders=SOURCES,
        axes=tuple(PRODUCT),
        seconds=grid_seconds,
        note=f"{SAMPLE} combinations drawn from all of them with seed {seed} (--seed); 30 steps.",
    )
