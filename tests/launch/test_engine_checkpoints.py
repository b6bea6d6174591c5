"""Checkpoints do not know which engine wrote them, nor on how many ranks."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ringattn.launch.config_load import config_from_values
from ringattn.launch.engine import open_engine
from ringattn.launch.metrics import METRICS_FILE, read_lines
from ringattn.launch.model import Transformer, init_weights, random_weights
from ringattn.launch.model_config import model_config
from ringattn.launch.sample_run import sample_run
from ringattn.launch.saver import Restored, Saver
from ringattn.parallel.mesh import build_mesh
from ringattn.parallel.rows import as_sharded, empty_rows, rows_of
from tests.launch.checkpoints import comparable, stored_tensors
from tests.launch.engines import ENGINES, SHARDED
from tests.launch.training import (
    assert_parity,
    run_command,
    tiny_values,
    train_pooled,
    uneven_corpus,
    write_config,
)
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks

# Written by one engine on 2 ranks, with 2 packs per rank and step; read by the next one, on other
# ranks and with other parts of memory.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": (
        "fsdp",
        {"parallel.cp": 4, "train.accumulate": 2, "memory.checkpointing": "full",
         "memory.token_tile": 23},
    ),
    "fsdp": ("zero 3", {"parallel.dp": 2, "memory.checkpointing": "attention"}),
    "zero 3": (
        "zero 1", {"parallel.dp": 2, "parallel.cp": 2, "memory.checkpointing": "sequence"}
    ),
    "zero 1": (
        "zero 2",
        {"train.accumulate": 2, "memory.checkpointing": "full", "memory.offload": True},
    ),
    "zero 2": ("ddp", {"parallel.dp": 2}),
}  # fmt: skip
SAVED = {"parallel.cp": 2, "train.accumulate": 2, "train.steps": 6}
SHAPE = {
    # A vocabulary and a width that no number of ranks divides.
    "layers": 2, "dim": 36, "heads": 4, "kv_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run of 6 steps of an engine at cp = 2, saved after 3 and 6; made once."""

    @functools.cache
    def run(engine: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "run"
        values = tiny_values(corpus, folder, checkpoint__every=3)
        train_pooled(values | SAVED | ENGINES[engine])
        return folder

    return run


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_bitwise(engine: str, saved: Any, corpus: Path, tmp_path: Path) -> None:
    """Nothing changed: the rest of the run, and all that is saved, are the same bits."""
    source = saved(engine)
    values = tiny_values(corpus, tmp_path / "run") | SAVED
    values |= {"checkpoint.resume": str(source / "checkpoints" / "step-000003")}
    got = train_pooled(values | ENGINES[engine])
    assert comparable(got) == comparable(read_lines(source / METRICS_FILE)[3:])
    expected = stored_tensors(source / "checkpoints" / "step-000006")
    final = stored_tensors(tmp_path / "run" / "checkpoints" / "step-000006")
    assert expected.keys() == final.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, final[name]), name


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_by_another_engine(engine: str, saved: Any, corpus: Path, tmp_path: Path) -> None:
    reader, mesh = READERS[engine]
    source = saved(engine)
    values = tiny_values(corpus, tmp_path / "run", train__steps=6)
    values |= {"checkpoint.resume": str(source / "checkpoints" / "step-000003")}
    got = train_pooled(values | ENGINES[reader] | mesh)
    assert_parity(read_lines(source / METRICS_FILE)[3:], got)


def test_all_write_the_same(saved: Any) -> None:
    """Names, shapes and dtypes; values up to the order of additions."""
    expected = stored_tensors(saved("ddp") / "checkpoints" / "step-000003")
    assert expected["optimizer/model.norm.weight/step"] == 3
    for engine in SHARDED:
        got = stored_tensors(saved(engine) / "checkpoints" / "step-000003")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].shape == tensor.shape
            assert got[name].dtype == tensor.dtype
            if name != "rng/cpu":
                torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-6)


def _fill_with_ones(found: dict[str, torch.Tensor]) -> None:
    for tensor in found.values():
        tensor.fill_(1.0)


def _checked_start(checkpoint: Path) -> Any:
    """Loading into engines whose optimizers hold something; what they hold then is checked."""
    restore = Saver.restore

    def checked(self: Saver) -> Restored:
        self._engine.load(_fill_with_ones)
        result = restore(self)
        expected = stored_tensors(checkpoint)
        for name, tensor in self._engine.tensors().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            want = expected[name] if name.startswith("model/") else torch.zeros_like(whole)
            assert torch.equal(whole, want), name
        return result

    return mock.patch.object(Saver, "restore", checked)


@pytest.fixture(scope="module")
def started(saved: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two steps of an engine at cp = 2 from the weights of another engine's run, on other data."""

    def run(engine: str) -> list[dict[str, Any]]:
        weights = saved("fsdp") / "checkpoints" / "step-000006"
        folder = tmp_path_factory.mktemp("started") / "run"
        values = tiny_values(corpus, folder, parallel__cp=2, train__steps=2, data__seq_len=96)
        values |= {"checkpoint.weights": str(weights)}
        return train_pooled(values | ENGINES[engine], functools.partial(_checked_start, weights))

    return functools.cache(run)


@pytest.mark.parametrize("engine", SHARDED)
def test_started_from_weights_of_another_run(engine: str, started: Any) -> None:
    """Weights are taken, a new optimizer starts from zero: as in the replicated engine."""
    assert_parity(started("ddp"), started(engine))


@pytest.mark.parametrize("engine", ["fsdp", "zero 3"])
def test_sample_reads_what_shards_wrote(engine: str, saved: Any) -> None:
    texts = []
    for folder in (saved(engine), saved("ddp")):
        parts: list[str] = []
        sample_run(
            folder, "the ", tokens=8, temperature=0.0, top_k=None, seed=0, write=parts.append
        )
        texts.append("".join(parts))
    assert texts[0] == texts[1]


def test_bfloat16_keeps_its_master_weights(corpus: Path, tmp_path: Path) -> None:
    """A resumed run goes on from float32 weights, not from the rounded ones."""
    for engine in SHARDED:
        folder = tmp_path / engine.replace(" ", "")
        values = tiny_values(
            corpus, folder, parallel__cp=2, train__steps=6, train__dtype="bf16", checkpoint__every=3
        )
        values |= ENGINES[engine]
        expected = train_pooled(values)
        values |= {"run.dir": str(folder / "again")}
        values |= {"checkpoint.resume": str(folder / "checkpoints" / "step-000003")}
        assert comparable(train_pooled(values)) == comparable(expected[3:])
        stored = stored_tensors(folder / "checkpoints" / "step-000006")
        weight = stored["model/model.embed_tokens.weight"]
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float())


def _engine_facts(rank: int, world: int, _group: Any, values: dict[str, Any]) -> Any:
    """First weights by name, and how many elements this rank keeps."""
    config = config_from_values(values)
    shape = model_config("debug", vocab_size=257, **SHAPE)
    mesh = build_mesh("cpu", dp=1, cp=world, timeout=COLLECTIVE_TIMEOUT)
    drawn: list[int] = []
    draw = random_weights(shape, config.seed)

    def weights(name: str, tensor: torch.Tensor) -> None:
        drawn.append(tensor.numel())
        draw(name, tensor)

    engine: Any = open_engine(config, shape, torch.device("cpu"), mesh, weights)
    whole, kept = {}, 0
    for name, tensor in engine.tensors().items():
        if name.startswith("model/"):
            sharded = isinstance(tensor, DTensor)
            kept += tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()
            whole[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            assert sharded == (config.parallel.engine != "ddp")
    resident = sum(p.numel() for p in engine._model.parameters() if not isinstance(p, DTensor))
    engine.close()
    engine.close()
    return whole, kept, resident, sum(drawn)


@pytest.mark.parametrize("engine", SHARDED)
def test_first_weights(engine: str) -> None:
    """The same draws, of which each rank keeps its part: no row is lost on odd shapes."""
    model = Transformer(model_config("debug", vocab_size=257, **SHAPE))
    init_weights(model, 5)
    total = sum(p.numel() for p in model.parameters())
    values = {"seed": 5, "parallel.cp": 4, **ENGINES[engine]}
    facts = run_ranks(4, _engine_facts, values)
    assert sum(kept for _, kept, _, _ in facts) == total
    for whole, _, resident, drawn in facts:
        assert drawn == total
        assert resident == (total if engine in ("zero 1", "zero 2") else 0)
        for name, parameter in model.named_parameters():
            assert torch.equal(whole[f"model/{name}"], parameter), name


def _rows(rank: int, world: int, group: Any) -> None:
    mesh = build_mesh("cpu", dp=world, cp=1, timeout=COLLECTIVE_TIMEOUT).world_mesh()
    for count in (0, 1, 2, 3, 4, 9):
        whole = torch.arange(2.0 * count).view(count, 2)
        assert torch.equal(as_sharded(rows_of(whole, mesh), whole.shape, mesh).full_tensor(), whole)
        assert empty_rows(whole.shape, mesh).to_local().shape == rows_of(whole, mesh).shape
    dist.barrier(group=group)


def test_rows() -> None:
    run_ranks(4, _rows)


def test_the_command_is_quiet(corpus: Path, tmp_path: Path) -> None:
    """Two ranks of DeepSpeed print what any run prints, and how to get a sample."""
    values = tiny_values(corpus, tmp_path / "run", parallel__cp=2, train__steps=2)
    config = write_config(tmp_path / "config.yaml", values | ENGINES["zero 3"])
    code, out, err = run_command("train", str(config))
    assert code == 0, err
    assert f"ringattn sample {tmp_path / 'run'}" in out
    for noise in ("DeepSpeed", "deepspeed", "WARNING", "Warning", "[INFO]"):
        assert noise not in out + err, out + err
