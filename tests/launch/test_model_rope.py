"""RoPE scaling: against transformers, against published formulas, and through the configuration."""

import math
from typing import Any

import pytest
import torch

from ringattn.errors import UserError
from ringattn.launch.config_check import check_config, resolve_model
from ringattn.launch.config_load import config_from_values
from ringattn.launch.model_config import ModelConfig, RopeScaling
from ringattn.launch.rope import apply_rope, attention_factor, rope_frequencies, rope_table

SCALINGS = [
    RopeScaling(kind="linear", factor=4.0),
    RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192),
    RopeScaling(kind="llama3", factor=32.0, high_freq_factor=2.0, original_max_seq_len=256),
    RopeScaling(kind="yarn", factor=16.0, original_max_seq_len=4096),
    RopeScaling(kind="yarn", factor=2.5, original_max_seq_len=2048, beta_fast=20, beta_slow=2),
    RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=32768, attention_factor=1.5),
    RopeScaling(kind="yarn", factor=1.0, original_max_seq_len=128),
]


def transformers_rope(
    scaling: RopeScaling, theta: float, head_dim: int
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and attention factor of the installed transformers."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama")
    parameters: dict[str, Any] = {
        "rope_type": scaling.kind,
        "rope_theta": theta,
        "factor": scaling.factor,
    }
    if scaling.kind != "linear":
        parameters["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        parameters["beta_fast"] = scaling.beta_fast
        parameters["beta_slow"] = scaling.beta_slow
        if scaling.attention_factor is not None:
            parameters["attention_factor"] = scaling.attention_factor
    config = llama.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(scaling.factor * scaling.original_max_seq_len),
        rope_parameters=parameters,
    )
    return rope_utils.ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.kind}-{s.factor:g}")
@pytest.mark.parametrize("theta, head_dim", [(10_000.0, 32), (500_000.0, 128)])
def test_agrees_with_transformers(scaling: RopeScaling, theta: float, head_dim: int) -> None:
    want, want_factor = transformers_rope(scaling, theta, head_dim)
    got = rope_frequencies(head_dim, theta, scaling)
    assert got.dtype == torch.float64
    # transformers computes in float32.
    torch.testing.assert_close(got, want.double(), rtol=2e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(want_factor, rel=1e-12)


def test_ntk_is_the_published_change_of_base() -> None:
    theta, head_dim, factor = 10_000.0, 64, 8.0
    plain = rope_frequencies(head_dim, theta, None)
    got = rope_frequencies(head_dim, theta, RopeScaling(kind="ntk", factor=factor))
    base = theta * factor ** (head_dim / (head_dim - 2))
    want = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    # The highest frequency stays, the lowest is divided by the factor.
    assert got[0] == plain[0]
    assert got[-1].item() == pytest.approx(plain[-1].item() / factor, rel=1e-12)


@pytest.mark.parametrize("head_dim", [2, 8])
def test_ntk_by_one_changes_nothing(head_dim: int) -> None:
    scaling = RopeScaling(kind="ntk", factor=1.0)
    want = rope_frequencies(head_dim, 1e4, None)
    assert torch.equal(rope_frequencies(head_dim, 1e4, scaling), want)


def test_yarn_raises_logits_by_the_factors_square() -> None:
    plain = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64, attention_factor=1.0)
    warm = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64)
    shape: dict[str, Any] = {
        "vocab_size": 8, "dim": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8,
        "ffn_dim": 8,
    }  # fmt: skip
    q, k = torch.randn(2, 1, 5, 1, 8, dtype=torch.float64)
    logits = []
    for scaling in (plain, warm):
        table = rope_table(torch.arange(5), ModelConfig(**shape, rope_scaling=scaling))
        turned = [apply_rope(x, *table)[0, :, 0] for x in (q, k)]
        logits.append(turned[0] @ turned[1].T)
    want = (0.1 * math.log(4.0) + 1) ** 2
    torch.testing.assert_close(logits[1], want * logits[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "values, want",
    [
        ({"size": "debug"}, None),
        ({"size": "1b"}, RopeScaling(factor=32.0)),
        ({"size": "1b", "rope_scaling": "none"}, None),
        ({"size": "1b", "rope_factor": 64}, RopeScaling(factor=64.0)),
        ({"size": "1b", "rope_scaling": "yarn"}, RopeScaling(kind="yarn", factor=32.0)),
        (
            {"rope_scaling": "yarn", "rope_factor": 8, "rope_original_seq_len": 2048},
            RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=2048),
        ),
        ({"rope_scaling": "ntk", "rope_factor": 8}, RopeScaling(kind="ntk", factor=8.0)),
    ],
)
def test_configuration_of_the_scaling(values: dict[str, Any], want: RopeScaling | None) -> None:
    config = config_from_values({f"model.{key}": value for key, value in values.items()})
    check_config(config)
    assert resolve_model(config, 257).rope_scaling == want


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rope_scaling": "longrope"}, r"model\.rope_scaling=longrope"),
        ({"rope_scaling": "linear"}, r"needs model\.rope_factor"),
        ({"rope_scaling": "yarn", "rope_factor": 2}, r"needs model\.rope_original_seq_len"),
        ({"rope_factor": 2}, r"model\.rope_factor=2.*needs a RoPE scaling"),
        ({"size": "1b", "rope_scaling": "none", "rope_original_seq_len": 4}, "needs a RoPE"),
        ({"size": "1b", "rope_factor": 0.5}, r"rope_scaling\.factor=0\.5"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], message: str) -> None:
    config = config_from_values({f"model.{key}": value for key, value in values.items()})
    with pytest.raises(UserError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "dynamic"},
        {"kind": "yarn", "beta_slow": 32.0},
        {"kind": "yarn", "attention_factor": 0.0},
        {"kind": "yarn", "original_max_seq_len": 0},
        {"kind": "ntk", "factor": math.nan},
    ],
)
def test_impossible_scalings(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="rope_scaling"):
        RopeScaling(**fields)
