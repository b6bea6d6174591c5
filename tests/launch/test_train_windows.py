"""Layers with sliding windows: the losses of the second decoder, whatever the mesh."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ringattn.launch import feed
from ringattn.launch.config_load import config_from_values
from ringattn.launch.data_loader import MicroBatch
from ringattn.launch.flops import attention_flops
from ringattn.launch.job import build_context, open_job
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.packing import IGNORE, Pack
from tests.launch.naive_llama import naive_logits
from tests.launch.training import assert_parity, tiny_values, train_pooled, uneven_corpus

WINDOW = 11
LAYERS: dict[str, Any] = {"model.layers": 3, "model.window": WINDOW, "model.full_every": 2}
MESHES: dict[str, dict[str, Any]] = {
    "cp2": {"parallel.cp": 2},
    "cp4": {"parallel.cp": 4},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


def values(corpus: Path, run_dir: Path) -> dict[str, Any]:
    return tiny_values(corpus, run_dir, train__steps=5) | LAYERS


@pytest.fixture(scope="module")
def one_rank(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train_pooled(values(corpus, tmp_path_factory.mktemp("one") / "run"))


def test_first_loss_is_that_of_the_second_decoder(
    corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = open_job(config_from_values(values(corpus, tmp_path / "run")), 1)
    assert job.identity["model.window"] == WINDOW
    assert job.identity["model.full_every"] == 2
    model = Transformer(job.shape)
    init_weights(model, job.config.seed)
    pack = job.train.pack(0)
    with_windows = _naive_loss(model, pack, [WINDOW, None, WINDOW])
    assert one_rank[0]["loss"] == pytest.approx(with_windows, rel=1e-6)
    for wrong in ([None] * 3, [None, WINDOW, None], [10, None, 10]):
        assert one_rank[0]["loss"] != pytest.approx(_naive_loss(model, pack, wrong), rel=1e-6)


def _naive_loss(model: Transformer, pack: Pack, windows: Sequence[int | None]) -> float:
    owner = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths))
    causal = (owner[:, None] == owner).tril()
    allowed = [causal if w is None else causal.triu(1 - w) for w in windows]
    tokens = torch.from_numpy(pack.tokens)
    logits = naive_logits(model.state_dict(), model.cfg, tokens, torch.arange(len(owner)), allowed)
    labels = torch.from_numpy(pack.labels)
    return float(F.cross_entropy(logits, labels, ignore_index=IGNORE))


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_do_not_depend_on_cp(
    mesh: str, corpus: Path, one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    got = train_pooled(values(corpus, tmp_path / "run") | MESHES[mesh])
    assert_parity(one_rank, got)


def test_areas_are_counted_per_layer(corpus: Path, tmp_path: Path) -> None:
    """A pack counts once, on the first rank of its group, and windows count what they allow."""
    job = open_job(config_from_values(values(corpus, tmp_path / "run")), 1)
    cp = build_context(job.config, job.shape, 2)
    plans = cp.plans(feed.layer_masks([100, 60], job.shape.windows))
    nothing = torch.zeros(160, dtype=torch.int64).numpy()
    areas = feed.own_areas(MicroBatch(nothing, nothing, [100, 60], plans, [0]))
    full = (100 * 101 + 60 * 61) // 2
    window = full - (89 * 90 + 49 * 50) // 2
    assert areas == [window, full, window]
    assert attention_flops(job.shape, areas) == 14 * (full + 2 * window) * 4 * 8
    cp.rank = 1
    assert feed.own_areas(MicroBatch(nothing, nothing, [100, 60], plans, [0])) == [0, 0, 0]
