"""Training from a Hugging Face folder, and `ringattn export`."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors
from ringattn.launch.config_check import resolve_model
from ringattn.launch.config_load import config_from_values
from ringattn.launch.job import open_job
from ringattn.launch.main import main
from ringattn.launch.model import Transformer
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import prepare
from ringattn.launch.run_folder import read_model
from ringattn.launch.tokenizer import load_tokenizer
from tests.launch.corpora import write_jsonl
from tests.launch.engines import ENGINES, SHARDED
from tests.launch.hf_checkpoints import build, logits_of, save
from tests.launch.test_data_tokenizer import hf_folder
from tests.launch.training import assert_parity, tiny_values, train_pooled

TOKENS = torch.arange(24)[None] % 10
Lines = list[dict[str, Any]]
SHAPE_KEYS = ("model.layers", "model.dim", "model.heads", "model.kv_heads", "model.head_dim")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus in the ids of a Hugging Face tokenizer."""
    folder, draw = tmp_path_factory.mktemp("words"), random.Random(0)
    words = ["red", "green", "blue"]
    texts = [" ".join(draw.choices(words, k=5 + i)) for i in range(60)]
    source, tokenizer = write_jsonl(folder / "texts.jsonl", texts), hf_folder(folder / "tokenizer")
    prepare(source, folder / "corpus", tokenizer=str(tokenizer), holdout=0.1, seed=1)
    return folder / "corpus"


def values_of(corpus: Path, run: Path, hf: Path, **overrides: object) -> dict[str, object]:
    values = tiny_values(
        corpus, run, model__hf=str(hf), data__seq_len=96, train__steps=2, parallel__cp=2
    )
    return {k: v for k, v in values.items() if k not in SHAPE_KEYS} | overrides


def test_train_and_export(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Continues a checkpoint on two ranks; what is exported computes what was trained."""
    theirs = build("qwen2")
    run, out = tmp_path / "run", tmp_path / "out"
    values = values_of(corpus, run, save(theirs, tmp_path / "hf"))
    steps = train_pooled(values)

    pack = PackedDataset(corpus, "train", 96, seed=7).pack(0)
    tokens, labels = torch.from_numpy(pack.tokens)[None], torch.from_numpy(pack.labels)[None]
    with torch.no_grad():
        # Positions that start again are how transformers is told of documents.
        positions = torch.cat([torch.arange(length) for length in pack.lengths])[None]
        logits = theirs(tokens, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100)
    assert steps[0]["loss"] == pytest.approx(float(loss), rel=1e-5)

    assert main(["export", str(run), "--out", str(out), "--dtype", "fp32"]) == 0
    assert "wrote" in capsys.readouterr().out
    ours = Transformer(read_model(run)[0])
    weights = {f"model/{name}": p.detach() for name, p in ours.named_parameters()}
    load_tensors(find_checkpoints(run)[-1], weights, alone=True)
    exported = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        trained = exported(TOKENS, use_cache=False).logits
        error = (logits_of(ours, TOKENS) - trained).abs().max() / trained.abs().max()
        change = (theirs(TOKENS, use_cache=False).logits - trained).abs().max()
    assert error <= 1e-5
    assert change > 1e-2
    assert load_tokenizer(out).encode("red blue").tolist() == [2, 9]
    assert exported.config.eos_token_id == 1

    # Other first weights of the same shape are another run.
    again = values | {"model.hf": str(save(build("qwen2"), tmp_path / "other")), "train.steps": 3}
    with pytest.raises(UserError, match="model.hf"):
        open_job(config_from_values(again), 2)
    open_job(config_from_values(values | {"train.steps": 3}), 2)

    assert main(["export", str(run), "--out", str(out)]) == 2
    assert main(["export", str(run), "--out", str(tmp_path / "x"), "--checkpoint", "1"]) == 2
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("ringattn: ")]
    words = ["is not empty", "is not among the steps kept, [2]", "holds no model.json"]
    assert [word in line for word, line in zip(words, errors, strict=True)] == [True] * 3


@pytest.fixture(scope="module")
def first_step(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Lines]:
    """One step from a checkpoint, on two ranks of an engine; each is made once."""
    folder = tmp_path_factory.mktemp("first")
    hf = save(build("qwen3"), folder / "hf")

    def run(engine: str) -> Lines:
        values = values_of(corpus, folder / engine.replace(" ", ""), hf)
        return train_pooled(values | {"train.steps": 1} | ENGINES[engine])

    return functools.cache(run)


@pytest.mark.parametrize("engine", SHARDED)
def test_engines_load_their_shards(engine: str, first_step: Callable[..., Lines]) -> None:
    """Sharded engines start from the checkpoint's weights: the same loss and gradient norm."""
    assert_parity(first_step("ddp"), first_step(engine))


def test_what_the_checkpoint_gives(corpus: Path, tmp_path: Path) -> None:
    """The shape cannot be overridden; what changes no weight can."""
    hf = save(build("qwen3"), tmp_path / "hf")
    values = values_of(corpus, tmp_path / "run", hf)
    for key, value in {"model.layers": 3, "model.tie_embeddings": True}.items():
        with pytest.raises(UserError, match="given by the checkpoint"):
            resolve_model(config_from_values({**values, key: value}), 10)
    with pytest.raises(UserError, match="has 96 tokens, the corpus 97"):
        resolve_model(config_from_values(values), 97)
    changed = {"model.rope_theta": 5e5, "model.rope_scaling": "linear", "model.rope_factor": 2.0}
    shape = resolve_model(config_from_values({**values, **changed}), 10)
    assert shape.qk_norm
    assert shape.vocab_size == 96
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.factor == 2.0
