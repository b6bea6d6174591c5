"""`transformers` models over two ranks against their own eager attention on one device."""

from typing import Any

import pytest
import torch

from ringattn import hf
from ringattn.hf_attention import LayerMask
from tests.hf.models import FAMILIES, LENGTHS, build, draw_batch, one_device
from tests.ranks import run_ranks


def _train(
    _rank: int, _world: int, group: Any, family: str, how: str, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(family)
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    parallel = hf.attach(model, group, **options)
    ids, labels = draw_batch()
    batch = parallel.shard(ids, labels=labels, document_lengths=LENGTHS)
    if how == "local positions":
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    if how == "labels shifted after sharding":
        local = batch["ringattn"].plan(LayerMask()).shard(labels)
        batch["shift_labels"] = torch.nn.functional.pad(local[:, 1:], (0, 1), value=-100)
    loss = model(**batch).loss if how == "logits" else hf.loss(model, batch)
    loss.backward()
    parallel.sum_gradients()
    return float(parallel.sum(loss)), {name: p.grad for name, p in model.named_parameters()}


def error_of(family: str, how: str, **options: Any) -> float:
    """Largest relative error of the loss and of any parameter's gradient."""
    expected, grads = one_device(build(family), *draw_batch())
    (loss, found), (other, _) = run_ranks(2, _train, family, how, **options)
    assert loss == other
    assert found.keys() == grads.keys()
    errors = [abs(loss - expected) / abs(expected)]
    errors += [float((found[n] - g).norm() / g.norm()) for n, g in grads.items()]
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient(family: str) -> None:
    assert error_of(family, "fused") <= 1e-5


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_logits_and_checkpointing(family: str) -> None:
    assert error_of(family, "logits", method="ulysses") <= 1e-5
    assert error_of(family, "checkpointing", method="ring", layout="striped") <= 1e-5


@pytest.mark.parametrize("mutation", ["local positions", "labels shifted after sharding"])
def test_mistakes_are_seen(mutation: str) -> None:
    assert error_of("Llama", mutation) > 1e-3
