"""The decoder against a decoder written a second time, and the properties it must have."""

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.layers import Attend, RMSNorm
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import MODEL_SIZES, ModelConfig, RopeScaling, model_config
from ringattn.launch.rope import apply_rope, rope_table
from tests.closeness import assert_close
from tests.launch.naive_llama import dense_attend, naive_logits

LLAMA3 = RopeScaling(factor=8.0, original_max_seq_len=64)
LINEAR = RopeScaling(kind="linear", factor=4.0)


def small(**overrides: object) -> ModelConfig:
    shape = {"dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 40}
    return ModelConfig(**{"vocab_size": 50, "rope_theta": 100.0, **shape, **overrides})


def build(cfg: ModelConfig, seed: int = 0, scale: float = 8.0) -> Transformer:
    """A model with weights large enough for every part to matter."""
    model = Transformer(cfg)
    init_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1)
            parameter.add_(0.1 * torch.randn(parameter.shape) if parameter.dim() == 1 else 0)
    return model


def documents(lengths: list[int]) -> torch.Tensor:
    """bool (T, T), causal inside each document."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner).tril()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["plain", "linear", "llama3"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_against_the_second_decoder(tied: bool, scaling: RopeScaling | None, kv_heads: int) -> None:
    cfg = small(tie_embeddings=tied, rope_scaling=scaling, kv_heads=kv_heads)
    model = build(cfg).double()
    tokens, positions = torch.randint(50, (19,)), torch.randperm(200)[:19]
    allowed = documents([5, 14])
    got = model(tokens[None], positions, dense_attend(allowed))[0]
    wanted = naive_logits(model.state_dict(), cfg, tokens, positions, allowed)
    assert_close("logits", wanted, got, 1e-6)  # cos and sin are float32 in the model
    assert got.std() > 0.3, "the test's weights are too small to notice anything"


def test_hidden_states_then_head() -> None:
    model = build(small())
    inputs = torch.randint(50, (2, 9)), torch.arange(9), dense_attend(documents([9]))
    hidden = model(*inputs, hidden=True)
    assert hidden.shape == (2, 9, 24)
    assert torch.equal(model.lm_head(hidden), model(*inputs))


def test_rope_turns_by_the_difference_of_positions() -> None:
    cfg = small(head_dim=16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        turned = [apply_rope(x, *rope_table(torch.tensor([p]), cfg)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    assert_close("far", score(7, 3), score(100_007, 100_003), 1e-5)
    assert_close("origin", (q * k).sum(), score(5, 5), 1e-6)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_positions_per_sequence() -> None:
    model = build(small())
    tokens, attend = torch.randint(50, (2, 6)), dense_attend(documents([6]))
    positions = torch.stack([torch.arange(6), torch.randperm(90)[:6]])
    both = model(tokens, positions, attend)
    for b in range(2):
        assert_close(f"row {b}", model(tokens[b : b + 1], positions[b], attend)[0], both[b], 1e-6)


def test_grouped_queries_equal_repeated_heads() -> None:
    grouped = build(small(kv_heads=2))
    repeated = Transformer(small(kv_heads=4))
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith(("k_proj.weight", "v_proj.weight"))]:
        state[name] = state[name].view(2, 8, 24).repeat_interleave(2, dim=0).reshape(32, 24)
    repeated.load_state_dict(state)
    inputs = torch.randint(50, (1, 11)), torch.arange(11), dense_attend(documents([4, 7]))
    assert_close("logits", grouped(*inputs), repeated(*inputs), 1e-5)


def test_a_share_of_the_tokens_gives_that_share_of_the_logits() -> None:
    model = build(small())
    tokens, positions = torch.randint(50, (1, 12)), torch.arange(12)
    whole = model(tokens, positions, lambda q, k, v: q)
    picked = torch.tensor([1, 4, 11])
    part = model(tokens[:, picked], positions[picked], lambda q, k, v: q)
    assert_close("share", whole[:, picked], part, 1e-6)


def test_a_rank_without_tokens() -> None:
    model = build(small())
    empty = torch.zeros(1, 0, dtype=torch.int64)
    logits = model(empty, empty[0], lambda q, k, v: q + (k + v).repeat_interleave(2, dim=2))
    assert logits.shape == (1, 0, 50)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_attention_per_layer_in_order() -> None:
    model = build(small(layers=3))
    seen: list[int] = []

    def recorder(i: int) -> Attend:
        return lambda q, k, v: (seen.append(i), q)[1]

    tokens, positions = torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)
    model(tokens, positions, [recorder(i) for i in range(3)])
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="2 attention callables for 3 layers"):
        model(tokens, positions, [recorder(0), recorder(1)])


def test_autocast_hands_attention_bf16_and_keeps_norms_wide() -> None:
    model = build(small(), scale=4.0)
    dtypes: set[torch.dtype] = set()
    inner = dense_attend(documents([10]))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dtypes.update((q.dtype, k.dtype, v.dtype))
        return inner(q, k, v)

    tokens, positions = torch.randint(50, (1, 10)), torch.arange(10)
    wanted = model(tokens, positions, inner)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens, positions, attend)
    assert dtypes == {torch.bfloat16}
    assert_close("bf16 logits", wanted, got, 0.03)
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    big = torch.full((1, 4), 3e4, dtype=torch.float16)  # its square overflows in half precision
    assert RMSNorm(4, 1e-5)(big).tolist() == [[1.0] * 4]


def test_weights_are_seeded_by_name() -> None:
    one, two = Transformer(small(layers=2)), Transformer(small(layers=2))
    init_weights(one, 3)
    init_weights(two, 3)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    init_weights(two, 4)
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    q0, q1 = (layer.self_attn.q_proj.weight for layer in one.model.layers)  # type: ignore[union-attr]
    assert not torch.equal(q0, q1)  # type: ignore[arg-type]
    wide = Transformer(small(layers=8, dim=256, ffn_dim=256))
    init_weights(wide, 0)
    state = wide.state_dict()
    for name, std in (("q_proj", 0.02), ("o_proj", 0.02 / 4), ("down_proj", 0.02 / 4)):
        found = [v.std().item() for n, v in state.items() if name in n]
        assert found == pytest.approx([std] * 8, rel=0.1), name
    assert (state["model.norm.weight"] == 1).all()


def test_tied_head_is_one_parameter() -> None:
    model = Transformer(small(tie_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_parameter_names_are_those_of_hugging_face() -> None:
    names = [name for name, _ in Transformer(small(layers=1)).named_parameters()]
    layer = "model.layers.0."
    assert sorted(names) == sorted(
        ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        + [f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"]
        + [f"{layer}mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
        + [f"{layer}{n}_layernorm.weight" for n in ("input", "post_attention")]
    )


def test_which_layers_have_a_window() -> None:
    assert model_config("debug", layers=2).windows == (None, None)
    assert model_config("debug", layers=2, window=5).windows == (5, 5)
    cfg = model_config("debug", layers=7, window=5, full_every=3)
    assert cfg.windows == (5, 5, None, 5, 5, None, 5)
    assert model_config("debug", layers=2, window=5, full_every=1).windows == (None, None)


def test_named_sizes_and_overrides() -> None:
    assert set(MODEL_SIZES) == {"debug", "demo", "1b", "8b", "70b"}
    cfg = model_config("8b", vocab_size=100, layers=None)
    assert (cfg.vocab_size, cfg.layers, cfg.ffn_dim) == (100, 32, 14_336)
    assert model_config("8b", dim=1024).ffn_dim == 3584
    assert model_config("8b", dim=1024, ffn_dim=8).ffn_dim == 8


@pytest.mark.parametrize(
    "size, overrides, says",
    [
        ("9b", {}, r"model\.size='9b'.*debug"),
        ("debug", {"width": 3}, r"model\.width: is no field"),
        ("debug", {"heads": 4, "kv_heads": 3}, r"model\.heads=4: must be a multiple"),
        ("debug", {"head_dim": 33}, r"model\.head_dim=33: must be even"),
        ("debug", {"layers": 0}, r"model\.layers=0: must be positive"),
    ],
)
def test_refusals(size: str, overrides: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        model_config(size, **overrides)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "longrope"}, {"factor": 0.5}, {"low_freq_factor": 4.0}, {"factor": float("nan")}],
)
def test_scaling_refusals(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match="rope_scaling"):
        RopeScaling(**fields)  # type: ignore[arg-type]
