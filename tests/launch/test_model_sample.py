"""Generation: the key-value cache changes nothing, and draws follow their rules."""

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch import sample
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import model_config
from ringattn.launch.sample import CachedAttention, generate, pick
from ringattn.launch.tokenizer import ByteTokenizer
from tests.closeness import assert_close
from tests.launch.naive_llama import dense_attend


@pytest.fixture
def model() -> Transformer:
    model = Transformer(model_config("debug", max_seq_len=100))
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 5, 6], [1, 19]], ids=str)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_full_forward(model: Transformer, pieces: list[int]) -> None:
    tokens, positions = torch.randint(257, (2, 20)), torch.arange(20)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    wanted = model(tokens, positions, dense_attend(causal))
    caches = [CachedAttention(20) for _ in range(model.cfg.layers)]
    got = [
        model(part, place, caches)
        for part, place in zip(tokens.split(pieces, 1), positions.split(pieces), strict=True)
    ]
    assert_close("logits", wanted, torch.cat(got, dim=1), 1e-5)
    with pytest.raises(ValueError, match="21 tokens in a cache for 20"):
        model(tokens[:, :1], positions[:1], caches)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=str)
@pytest.mark.parametrize("window", [1, 5, 19])
@torch.no_grad()
def test_a_cache_with_a_window(
    model: Transformer, window: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in parts of 6, whole prompts and single tokens, beside a layer that sees everything."""
    monkeypatch.setattr(sample, "_LEAST_ROWS", 6)
    tokens, positions = torch.randint(257, (2, 20)), torch.arange(20)
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    wanted = model(tokens, positions, [dense_attend(causal.triu(1 - window)), dense_attend(causal)])
    caches = [CachedAttention(20, window), CachedAttention(20)]
    got = [
        model(part, place, caches)
        for part, place in zip(tokens.split(pieces, 1), positions.split(pieces), strict=True)
    ]
    assert_close("logits", wanted, torch.cat(got, dim=1), 1e-5)


@torch.no_grad()
def test_generation_keeps_to_the_windows(model: Transformer) -> None:
    """Layers whose window is one token mix nothing: the text depends on the last token alone."""
    narrow = Transformer(model_config("debug", max_seq_len=100, window=1))
    narrow.load_state_dict(model.state_dict())
    texts = [
        generate(made, ByteTokenizer(), prompt, tokens=20, temperature=4.0)
        for made in (model, narrow)
        for prompt in ("abracab", "xyzuvwb")
    ]
    assert texts[0] != texts[1]
    assert texts[2] == texts[3]


@torch.no_grad()
def test_greedy_equals_the_argmax_of_full_forwards(model: Transformer) -> None:
    ids = list(b"def main")
    for _ in range(12):
        n = len(ids)
        causal = dense_attend(torch.ones(n, n, dtype=torch.bool).tril())
        ids.append(int(model(torch.tensor([ids]), torch.arange(n), causal)[0, -1].argmax()))
    seen: list[int] = []
    text = generate(
        model, ByteTokenizer(), "def main", tokens=12, temperature=0, on_token=seen.append
    )
    assert seen == ids[8:]
    assert text == ByteTokenizer().decode(seen)


def test_a_seed_repeats_and_another_differs(model: Transformer) -> None:
    texts = [
        generate(model, ByteTokenizer(), "x", tokens=30, temperature=1.0, top_k=None, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_end_of_document_stops(model: Transformer) -> None:
    class EndsAtOnce(ByteTokenizer):
        eos_id = 0

    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token equally likely: the lowest id is taken
    assert generate(model, EndsAtOnce(), "x", tokens=5, temperature=0) == ""


def test_pick() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert pick(logits, 0, None, generator) == 1
    drawn = {pick(logits, 5.0, 2, generator) for _ in range(200)}
    assert drawn == {1, 2}
    assert {pick(logits, 100.0, 9, generator) for _ in range(200)} == {0, 1, 2, 3}
    share = sum(pick(logits, 1.0, 2, generator) == 1 for _ in range(4000)) / 4000
    assert share == pytest.approx(1 / (1 + torch.e**-0.1), abs=0.04)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"prompt": ""}, "at least one token"),
        ({"tokens": -1}, "tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"tokens": 100}, r"prompt of 3 tokens \+ 100 new: must fit model\.max_seq_len=100"),
    ],
)
def test_refusals(model: Transformer, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate(model, ByteTokenizer(), **{"prompt": "abc", **options})


def test_a_foreign_tokenizer_is_refused() -> None:
    model = Transformer(model_config("debug", vocab_size=50))
    with pytest.raises(UserError, match="token id 120 of the prompt"):
        generate(model, ByteTokenizer(), "x")
