"""Counts of parameters and operations against models on the meta device and torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ringattn.launch.flops import attention_flops, flops_per_step, matmul_parameters, parameters
from ringattn.launch.model import Transformer
from ringattn.launch.model_config import MODEL_SIZES, model_config


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_parameters_equal_the_model_on_meta(size: str) -> None:
    cfg = MODEL_SIZES[size]
    with torch.device("meta"):
        model = Transformer(cfg)
    assert parameters(cfg) == sum(p.numel() for p in model.parameters())
    products = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2}
    del products["model.embed_tokens.weight"]
    assert matmul_parameters(cfg) == sum(p.numel() for p in products.values())


@pytest.mark.parametrize("size, billions", [("1b", 1.236), ("8b", 8.030), ("70b", 70.554)])
def test_named_sizes_have_the_published_parameter_counts(size: str, billions: float) -> None:
    assert parameters(MODEL_SIZES[size]) / 1e9 == pytest.approx(billions, abs=0.001)


def test_step_equals_torchs_counter() -> None:
    """Everything but attention, as torch counts it, forward and backward."""
    cfg = model_config("debug")
    model = Transformer(cfg)
    tokens = torch.randint(cfg.vocab_size, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(64), lambda q, k, v: q * k.mean() * v.mean()).sum().backward()
    assert flops_per_step(cfg, 64, 0) == counter.get_total_flops()


def test_attention_by_exact_area() -> None:
    cfg = model_config("debug", layers=3, heads=4, head_dim=32)
    area = 64 * 65 // 2
    assert attention_flops(cfg, area, backward=False) == 3 * 4 * area * 128
    assert attention_flops(cfg, [area, 0, 10]) == 14 * (area + 10) * 128
    assert flops_per_step(cfg, 64, area) == 6 * matmul_parameters(cfg) * 64 + 42 * area * 128
    with pytest.raises(ValueError, match="2 mask areas for 3 layers"):
        attention_flops(cfg, [1, 2])
