"""Tests of long contexts against naive computations, and equal under any cp and dp."""

import contextlib
import io
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints, load_tensors
from ringattn.launch.config_load import load_config
from ringattn.launch.evaluate_run import ContextRequest, _open, _test_on_rank
from ringattn.launch.main import main
from ringattn.launch.model import Transformer
from ringattn.launch.needle_corpus import NeedleCorpus, real_text, write_needles
from ringattn.launch.needles import NeedleFormat, NeedleWriter
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import prepare
from ringattn.launch.ranks import Ranks
from ringattn.launch.run_folder import read_model
from ringattn.launch.session import Session
from tests.launch.corpora import random_texts, stored_documents, write_jsonl
from tests.launch.training import tiny_values, train_pooled
from tests.ranks import run_ranks

# Values of one of two letters: a model that has learned only that much retrieves half of them.
FMT = NeedleFormat(
    statement="<{key}={value}>", question="<{key}={value}", keys="XYZ", key_length=2,
    values="ab", value_length=1,
)  # fmt: skip
LENGTHS = (40, 96)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on needles in random text, with the corpora beside it."""
    folder = tmp_path_factory.mktemp("context")
    texts = [*random_texts(40, 0, longest=200), *random_texts(12, 1, longest=90)]
    prepare(write_jsonl(folder / "t.jsonl", texts), folder / "text", holdout=0.4)
    wanted = NeedleCorpus(tokens=8000, shortest=60, longest=90, every=1)
    write_needles(folder / "text", folder / "needles", wanted, FMT)
    values = tiny_values(
        folder / "needles", folder / "run", train__steps=40, train__lr=1e-2, train__eval_packs=1
    )
    train_pooled(values)
    return folder


def request_of(folder: Path, out: Path, **changes: Any) -> ContextRequest:
    fields: dict[str, Any] = {
        "run": str(folder / "run"), "text": str(folder / "text"),
        "needles": str(folder / "needles"),
        "lengths": LENGTHS, "depths": 3, "samples": 4, "distractors": 1, "targets": 30,
        "out": str(out),
    }  # fmt: skip
    return ContextRequest(**fields | changes)


def _evaluate_on_rank(
    rank: int, world: int, _group: Any, request: ContextRequest, overrides: list[str]
) -> None:
    config = load_config(Path(request.run) / "config.yaml", overrides)
    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    timeout = timedelta(seconds=300)
    session = Session(ranks=ranks, device=torch.device("cpu"), timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()):
        _test_on_rank(request, config, session)


def evaluate_pooled(run: Path, out: Path, cp: int, dp: int, **changes: Any) -> dict[str, Any]:
    overrides = [f"parallel.cp={cp}", f"parallel.dp={dp}"]
    run_ranks(cp * dp, _evaluate_on_rank, request_of(run, out, **changes), overrides)
    return json.loads((out / "context.json").read_text())


@pytest.fixture(scope="module")
def result(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank finds."""
    return evaluate_pooled(run, tmp_path_factory.mktemp("one"), 1, 1)


@pytest.fixture(scope="module")
def model(run: Path) -> Transformer:
    shape, _ = read_model(run / "run")
    made = Transformer(shape).eval()
    weights = {f"model/{name}": p.detach() for name, p in made.named_parameters()}
    load_tensors(find_checkpoints(run / "run")[-1], weights, alone=True)
    return made


@torch.no_grad()
def naive_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """All logits of one causal document, by PyTorch's own attention."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return model(torch.tensor([tokens]), torch.arange(len(tokens)), attend)[0]


def test_loss_by_position(run: Path, model: Transformer, result: dict[str, Any]) -> None:
    """Each document of the held-out text alone, cut where a sequence ends."""
    got = result["position"]
    length = max(LENGTHS)
    sums = np.zeros((2, length.bit_length()))
    flat = [t for d in stored_documents(run / "text", "heldout") for t in d]
    total = len(flat) // length
    packs = min(16, total)
    for number in range(packs):
        at = number * total // packs * length
        segment: list[int] = []
        for place in range(at, at + length):
            segment.append(flat[place])
            ends = flat[place] == 256
            if ends or place == at + length - 1:
                following = [] if ends else [flat[(place + 1) % len(flat)]]
                logits = naive_logits(model, segment)
                targets = torch.tensor([*segment[1:], *following])
                losses = F.cross_entropy(logits[: len(targets)], targets, reduction="none")
                for seen, loss in enumerate(losses.tolist(), start=1):
                    sums[:, int(math.log2(seen))] += (loss, 1)
                segment = []
    assert got["tokens"] == sums[1].astype(int).tolist()
    assert sum(got["tokens"]) > 1000
    for have, loss, count in zip(got["loss"], *sums, strict=True):
        assert have == pytest.approx(loss / count, rel=1e-5) if count else have is None
    assert got["context"] == [1, 2, 4, 8, 16, 32, 64]


def test_loss_by_context(run: Path, model: Transformer, result: dict[str, Any]) -> None:
    got = result["context"]
    longest, targets = max(LENGTHS), 30
    long = [d for d in stored_documents(run / "text", "heldout") if len(d) > longest]
    assert len(long) < 16  # so that windows run through joined documents
    assert got["joined"]
    text = PackedDataset(run / "text", "heldout", longest)
    for place, length in enumerate(LENGTHS):
        losses = []
        for number in range(16):
            joined = real_text(text, number * (text.tokens // 16), longest)[:longest]
            tokens = joined[longest - length :].tolist()
            logits = naive_logits(model, tokens)[-targets - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(tokens[-targets:])).item())
        assert got["loss"][place] == pytest.approx(np.mean(losses), rel=1e-5)
        assert got["perplexity"][place] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert got["tokens"] == [16 * targets] * 2


def test_windows_inside_documents(run: Path, tmp_path: Path) -> None:
    got = evaluate_pooled(
        run, tmp_path, 1, 1, lengths=(20, 50), targets=10, samples=1, tests=("context",)
    )
    assert got["context"]["joined"] is False
    assert "needles" not in got


def test_needles_are_what_greedy_generation_gives(
    run: Path, model: Transformer, result: dict[str, Any]
) -> None:
    got = result["needles"]
    text = PackedDataset(run / "text", "heldout", max(LENGTHS))
    want = np.zeros((2, 3))
    for a, length in enumerate(LENGTHS):
        for b in range(3):
            for sample in range(4):
                rng = np.random.Generator(np.random.PCG64([0, length, b, sample]))
                start = int(rng.integers(text.tokens))
                writer = NeedleWriter(FMT, text.tokenizer, rng)
                case = writer.haystack(real_text(text, start, length), length, b / 2, 1)
                prompt = case.tokens[: -case.answer].tolist()
                for token in case.tokens[-case.answer :].tolist():
                    likeliest = int(naive_logits(model, prompt)[-1].argmax())
                    if likeliest != token:
                        break
                    prompt.append(likeliest)
                want[a, b] += len(prompt) == length
    assert got["retrieved"] == (want / 4).tolist()
    assert 0 < np.mean(got["retrieved"]) < 1  # so that a wrong row would show
    assert got["depths"] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("cp, dp", [(2, 1), (1, 2), (2, 2)])
def test_equal_under_any_ranks(
    cp: int, dp: int, run: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    got = evaluate_pooled(run, tmp_path, cp, dp)
    assert got["needles"] == result["needles"]
    for name in ("position", "context"):
        for key, want in result[name].items():
            have = got[name][key]
            assert have == (pytest.approx(want, rel=1e-5) if isinstance(want, list) else want)


def test_the_command_writes_numbers_and_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(run / "run"), "--text", str(run / "text"), "--out", str(tmp_path)]
    words += ["--lengths", "72,80", "--targets", "8", "--samples", "1", "--distractors", "0"]
    scaled = ["model.rope_scaling=linear", "model.rope_factor=2"]
    assert main([*words, *scaled]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "context.json", "context.png", "needles.png", "position.png",
    ]  # fmt: skip
    result = json.loads((tmp_path / "context.json").read_text())
    assert result["rope_scaling"]["kind"] == "linear"
    assert result["step"] == 40
    assert "needles retrieved" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tests": ("niah",)}, "--tests niah"),
        ({"depths": 0}, "--depths 0"),
        ({"lengths": (1, 8)}, "--lengths 1"),
        ({"text": "nowhere"}, "holds no prepared corpus"),
        ({"needles": "text"}, "was not made by ringattn needles"),
        ({"run": "nothing"}, r"holds no config\.yaml"),
    ],
)
def test_refusals(run: Path, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for key in ("text", "needles", "run"):
        if key in changes:
            changes = changes | {key: str(run / changes[key])}
    config = load_config(run / "run" / "config.yaml")
    with pytest.raises(UserError, match=message):
        _open(request_of(run, tmp_path, **changes), config, 1)


def test_each_host_needs_gpus_for_its_own_ranks(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    overrides = ["run.device=cuda", "parallel.cp=4", "attention.kernel=matmul"]
    config = load_config(run / "run" / "config.yaml", overrides)
    request = request_of(run, tmp_path)
    assert _open(request, config, local_world=2).lengths == LENGTHS
    with pytest.raises(UserError, match="4 ranks, 2 GPUs on this host"):
        _open(request, config, local_world=4)
