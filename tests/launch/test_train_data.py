"""Training with a curriculum, a mixture and other weights: exact resume, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, read_state
from ringattn.launch.config_check import check_config
from ringattn.launch.config_load import config_from_values, dump_config, load_config
from ringattn.launch.job import open_job
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.prepare import prepare
from tests.launch.checkpoints import comparable, stored_tensors
from tests.launch.corpora import random_texts, write_jsonl
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus

CURRICULUM = [[0, 96], [3, 160], [5, 224]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("mixture")
    texts = write_jsonl(folder / "r.jsonl", random_texts(40, 1, longest=300))
    prepare(texts, folder / "random", holdout=0.1)
    return {str(uneven_corpus(folder)): 2.0, str(folder / "random"): 1.0}


def values_of(corpora: dict[str, float], run_dir: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_values(
        Path("unused"),
        run_dir,
        data__mixture=corpora,
        data__curriculum=CURRICULUM,
        data__long_document=80,
        data__long_repeats=2,
        train__steps=7,
        **overrides,
    )


@pytest.fixture(scope="module")
def undisturbed(corpora: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps at cp = 2 over all three lengths, saved after each step."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    values = values_of(corpora, run_dir, parallel__cp=2, checkpoint__every=1, checkpoint__keep=0)
    train_pooled(values)
    return run_dir


def test_tokens_and_positions_follow_the_curriculum(undisturbed: Path) -> None:
    tokens = [line["tokens"] for line in read_lines(undisturbed / METRICS_FILE)]
    assert tokens == [96, 96, 96, 160, 160, 224, 224]
    positions = [read_state(path).position for path in find_checkpoints(undisturbed)]
    assert positions == [sum(tokens[:n]) for n in range(1, 8)]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_resume_across_a_change_of_length_is_bitwise_equal(
    step: int, corpora: dict[str, float], undisturbed: Path, tmp_path: Path
) -> None:
    checkpoint = undisturbed / "checkpoints" / f"step-{step:06d}"
    values = values_of(
        corpora, tmp_path / "run", parallel__cp=2, checkpoint__resume=str(checkpoint)
    )
    got = train_pooled(values)
    assert comparable(got) == comparable(read_lines(undisturbed / METRICS_FILE)[step:])
    ends = [find_checkpoints(folder)[-1] for folder in (undisturbed, tmp_path / "run")]
    want, have = map(stored_tensors, ends)
    assert all(torch.equal(want[name], have[name]) for name in want)


def test_one_rank_reads_the_same(
    corpora: dict[str, float], undisturbed: Path, tmp_path: Path
) -> None:
    got = train_pooled(values_of(corpora, tmp_path / "run"))
    assert_parity(read_lines(undisturbed / METRICS_FILE), got)


def test_another_mixture_does_not_continue(
    corpora: dict[str, float], undisturbed: Path, tmp_path: Path
) -> None:
    checkpoint = str(undisturbed / "checkpoints" / "step-000003")
    other = dict.fromkeys(corpora, 1.0)
    values = values_of(other, tmp_path / "run", checkpoint__resume=checkpoint)
    with pytest.raises(UserError, match=r"data\.mixture"):
        open_job(config_from_values(values), 1)
    values = values_of(corpora, tmp_path / "run", checkpoint__resume=checkpoint)
    with pytest.raises(UserError, match=r"data\.long_repeats=3"):
        open_job(config_from_values(values | {"data.long_repeats": 3}), 1)


def test_weights_of_another_run(
    corpora: dict[str, float], undisturbed: Path, tmp_path: Path
) -> None:
    """Step 0, no optimizer state, other data, length and rotary scaling; the same weights."""
    (path,) = list(corpora)[1:]
    values = tiny_values(
        Path(path),
        tmp_path / "run",
        checkpoint__weights=str(undisturbed),
        data__seq_len=64,
        model__rope_scaling="yarn",
        model__rope_factor=4,
        model__rope_original_seq_len=224,
        train__steps=1,
        train__warmup_steps=0,
        train__lr=1e-30,
        train__min_lr=0.0,
        train__weight_decay=0.0,
    )
    train_pooled(values)
    source = stored_tensors(find_checkpoints(undisturbed)[-1])
    got = stored_tensors(find_checkpoints(tmp_path / "run")[-1])
    names = [name for name in source if name.startswith("model/")]
    assert names
    assert all(torch.equal(source[name], got[name]) for name in names)
    assert read_state(find_checkpoints(tmp_path / "run")[-1]).position == 64
    # A run that has checkpoints of its own goes on from them.
    job = open_job(config_from_values(values | {"train.steps": 2}), 1)
    assert job.checkpoint is not None
    assert job.weights is None


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model.layers", 3, r"layers\.2.*no such parameter"),
        ("model.dim", 64, r"\(257, 64\).*\(257, 32\)"),
        ("checkpoint.weights", "/nowhere", r"checkpoint\.weights=/nowhere"),
    ],
)
def test_weights_of_another_shape_are_refused(
    key: str,
    value: Any,
    message: str,
    corpora: dict[str, float],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    values = values_of(corpora, tmp_path / "run", checkpoint__weights=str(undisturbed))
    with pytest.raises(UserError, match=message):
        open_job(config_from_values(values | {key: value}), 1)


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.curriculum=[[1, 64]]", "begin at step 0"),
        ("data.curriculum=[[0, 64], [0, 128]]", "rising steps"),
        ("data.curriculum=[[0, 64], [5, 1]]", "at least 2 tokens"),
        ("data.curriculum=[]", r"data\.curriculum=\[\]: must be a list"),
        ("data.curriculum=[[0, 64, 3]]", r"data\.curriculum=\[0, 64, 3\]: must be a list of 2"),
        ("data.mixture={a: -1}", r"weight -1\.0 of a"),
        ("data.mixture={a: x}", r"data\.mixture=x: must be a number"),
        ("data.long_repeats=2", r"needs data\.long_document"),
        ("data.curriculum=[[0, 2], [5, 64]] parallel.cp=4", "shortest=2"),
    ],
)
def test_refused_settings(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    late = override.split(" parallel", 1)
    words = [late[0], *(["parallel" + late[1]] if len(late) > 1 else [])]
    with pytest.raises(UserError, match=message):
        check_config(load_config(path, words))


def test_written_configuration_reads_back(corpora: dict[str, float], tmp_path: Path) -> None:
    config = config_from_values(values_of(corpora, tmp_path / "run"))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert config.data.longest == 224
    assert config.data.corpora == list(corpora.items())
