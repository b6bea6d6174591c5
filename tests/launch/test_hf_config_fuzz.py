"""What a config.json is refused for: models that are not computed, and malformed values."""

from typing import Any

import pytest

from ringattn.errors import UserError
from ringattn.launch.hf_config import config_from_hf
from ringattn.launch.model_config import ModelConfig
from tests.launch.hf_checkpoints import FULL, LLAMA3, SHAPE, WINDOW, YARN

BASE = {"model_type": "llama", **SHAPE, "hidden_act": "silu"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gpt2"}, "model_type='gpt2'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "MLP bias": ({"mlp_bias": True}, "mlp_bias"),
    "interleaved rotation": ({"rope_interleaved": True}, "rope_interleaved"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "a key of tomorrow": ({"attention_twist": 3}, "attention_twist=3"),
    "a classifier": ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
    "no width": ({"hidden_size": None}, "hidden_size=None"),
    "dynamic scaling": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"
    ),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    "half a scaling": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq"),
    "untruncated YaRN": ({"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
    "a scaling key": ({"rope_parameters": {**LLAMA3, "mscale": 2.0}}, "mscale"),
    "theta per layer": ({"rope_parameters": {"full_attention": LLAMA3}}, "full_attention"),
    "windows of Llama": ({"sliding_window": 4}, "sliding_window"),
    "windows above a layer": (
        {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
            "max_window_layers": 2,
        },
        "FFWW",
    ),
    "chunks": (
        {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"
    ),
    "layers too few": ({"model_type": "qwen3", "layer_types": [FULL]}, "must name 4 layers"),
    "a window of none": (
        {
            "model_type": "qwen3", "layer_types": [WINDOW] * 4, "use_sliding_window": True,
            "sliding_window": 0,
        },
        "sliding_window=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case: str) -> None:
    values, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        config_from_hf({**BASE, **values})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configs_of_transformers_4() -> None:
    old = {**BASE, "rope_theta": 5e5, "rope_scaling": dict(LLAMA3)}
    del old["rope_scaling"]["rope_theta"]
    new = {**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(BASE).rope_theta == 1e4
    assert config_from_hf({**BASE, "model_type": "mistral"}).window == 4096
    assert config_from_hf({**BASE, "model_type": "qwen3"}).head_dim == 128


SHARED = {
    **SHAPE, "hidden_act": "silu", "tie_word_embeddings": False, "head_dim": 16,
    "original_max_position_embeddings": 32, "rope_theta": 1e4, "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0, "is_causal": True,
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0},
    "llama3": LLAMA3,
    "yarn": {
        **YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5,
        "truncate": True,
    },
    "yarn with its factor": {**YARN, "attention_factor": 1.2},
}  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen3": {
        "use_sliding_window": True, "sliding_window": 5,
        "layer_types": [WINDOW, FULL, WINDOW, FULL],
    },
    "mistral": {"sliding_window": 6},
    "ministral": {"sliding_window": 6, "layer_types": [WINDOW, WINDOW, FULL, WINDOW]},
}  # fmt: skip
WRONG = (None, "x", -1, 0, 1.5, [], ["x"], {}, {"x": 1}, True, False, float("nan"), 10**400)


def check_outcome(raw: dict[str, Any]) -> None:
    """A model that holds numbers, or one line."""
    refusal, cfg = "", None
    try:
        cfg = config_from_hf(raw)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if refusal:
        return
    assert isinstance(cfg, ModelConfig)
    numbers = (cfg.dim, cfg.layers, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.max_seq_len)
    assert all(type(value) is int for value in numbers)
    assert isinstance(cfg.tie_embeddings, bool)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", WINDOWS)
def test_any_value_is_read_or_refused(kind: str, old: bool) -> None:
    """Each key of a valid file holds each of some values of other types, or is missing."""
    section, named = ("rope_scaling", "type") if old else ("rope_parameters", "rope_type")
    for rope in ROPES.values():
        inner = {named if key == "rope_type" else key: value for key, value in rope.items()}
        whole = {"model_type": kind, **SHARED, **WINDOWS[kind], section: inner}
        assert isinstance(config_from_hf(whole), ModelConfig)
        for key in whole:
            check_outcome({name: value for name, value in whole.items() if name != key})
            for value in WRONG:
                check_outcome({**whole, key: value})
        for key in inner:
            check_outcome(
                {**whole, section: {name: value for name, value in inner.items() if name != key}}
            )
            for value in WRONG:
                check_outcome({**whole, section: {**inner, key: value}})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"is_causal": False}, "is_causal=False"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": 16.5}}, "=16.5"),
        ({"rope_parameters": {**YARN, "truncate": None}}, "truncate=None"),
    ],
)
def test_values_that_would_go_unnoticed(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_from_hf({**BASE, **values})


def test_yarn_without_a_factor() -> None:
    """The factor that the contexts give also sets how much attention is raised."""
    scales = {"mscale": 1.0, "mscale_all_dim": 0.5}
    named = {**BASE, "rope_parameters": {**YARN, **scales}}
    unnamed = {**BASE, "rope_parameters": {**YARN, **scales, "factor": None}}
    assert config_from_hf(named) == config_from_hf(unnamed)
