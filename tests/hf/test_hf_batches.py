"""Packed documents stay apart; wrappers; and what is refused, each in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ringattn import hf
from ringattn.errors import UserError
from ringattn.hf_attention import LayerMask
from tests.hf.models import BASE, LENGTHS, build, draw_batch, one_device
from tests.ranks import run_ranks
from tests.test_imports import imports


def _hidden(_rank: int, _world: int, group: Any, family: str, changed: int | None) -> torch.Tensor:
    model = build(family).eval()
    parallel = hf.attach(model, group)
    ids, _ = draw_batch()
    if changed is not None:
        part = ids.split(LENGTHS, 1)[changed]
        part += 1
        part %= 64
    batch = parallel.shard(ids, document_lengths=LENGTHS)
    with torch.no_grad():
        return batch["ringattn"].unshard(model.base_model(**batch).last_hidden_state)


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_documents_do_not_leak(family: str) -> None:
    """Another document's tokens change nothing, bit for bit; and each is as if it were alone."""
    before, again = run_ranks(2, _hidden, family, None)
    after, _ = run_ranks(2, _hidden, family, 0)
    assert torch.equal(before, again)
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
    model = build(family).eval()
    parts = zip(draw_batch()[0].split(LENGTHS, 1), before.split(LENGTHS, 1), strict=True)
    with torch.no_grad():
        for tokens, hidden in parts:
            alone = model.base_model(tokens, use_cache=False).last_hidden_state
            assert (hidden - alone).norm() <= 1e-5 * alone.norm()


def _wrapped(_rank: int, world: int, group: Any, how: str) -> dict[str, torch.Tensor]:
    """Gradients under FSDP2 or DDP, scaled as the documentation of `ringattn.hf` says."""
    model = build("Llama")
    parallel = hf.attach(model, group)
    ids, labels = draw_batch()
    batch = parallel.shard(ids, labels=labels, document_lengths=LENGTHS)
    whole: Any = hf.CausalLoss(model)
    if how == "ddp":
        whole = DistributedDataParallel(whole)
        loss = whole(**batch) * world
    else:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
        for module in whole.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        loss = whole(**batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_wrappers(how: str) -> None:
    _, grads = one_device(build("Llama"), *draw_batch())
    found, _ = run_ranks(2, _wrapped, how)
    assert found.keys() == grads.keys()
    assert max(float((found[n] - g).norm() / g.norm()) for n, g in grads.items()) <= 1e-5


def test_what_is_sharded() -> None:
    parallel = hf.attach(build("Mistral"), 2, layout="zigzag")
    ids, labels = draw_batch()
    restarting = torch.cat([torch.arange(n) for n in LENGTHS])
    one = parallel.shard(ids, labels=labels, document_lengths=LENGTHS)
    two = parallel.shard(ids, labels=labels, position_ids=restarting)
    assert one["ringattn"].lengths == two["ringattn"].lengths == tuple(LENGTHS)
    assert torch.equal(one["position_ids"], two["position_ids"])
    # 48 tokens in each of 2 rows, less 3 documents' first tokens and 4 that do not count.
    assert one["num_items_in_batch"] == 2 * (48 - 3 - 4)
    mine = one["ringattn"].layout.positions(0)
    nexts = torch.tensor([t + 1 for t in mine if t + 1 not in (21, 23, 48)])
    kept = one["shift_labels"][0][[t + 1 not in (21, 23, 48) for t in mine]]
    assert torch.equal(kept, labels[0, nexts])
    assert set(one["ringattn"].plans) == {LayerMask(window=7)}
    assert parallel.shard(ids)["ringattn"].lengths == (48,)
    assert "labels" not in parallel.shard(ids)
    wide = torch.stack([torch.arange(48), restarting])
    with pytest.raises(UserError, match="rows hold different documents"):
        parallel.shard(ids, position_ids=wide)


def _llama(**values: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **values}))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no transformers model": (lambda: torch.nn.Linear(2, 2), "PreTrainedModel"),
    "dynamic rotation": (
        lambda: _llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type dynamic",
    ),
    "a state": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
        ),
        "Mamba",
    ),
    "an encoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
            )
        ),
        "cross attention",
    ),
    "chunks": (
        lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **BASE, num_local_experts=2, intermediate_size_mlp=8, attention_chunk_size=4
            )
        ),
        "chunked_attention",
    ),
    "a loss of routers": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **{**BASE, "num_hidden_layers": 1}, num_local_experts=2, output_router_logits=True
            )
        ),
        "output_router_logits",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_refused_models(case: str) -> None:
    build_model, words = MODELS[case]
    with pytest.raises(UserError) as caught:
        hf.attach(build_model(), 2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


IDS = torch.zeros(1, 48, dtype=torch.int64)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"attention_mask": torch.ones(1, 24)}, "padding"),
    "a mask of one's own": ({"attention_mask": torch.zeros(1, 1, 24, 24)}, "outside the model"),
    "a cache": ({"use_cache": True}, "use_cache=True"),
    "lengths": ({"cu_seq_lens_q": torch.tensor([0, 24])}, "cu_seq_lens_q"),
    "a bias": ({"position_bias": torch.zeros(1, 4, 24, 24)}, "position_bias=Tensor"),
    "a word of tomorrow": ({"attention_twist": 3}, "attention_twist=3"),
    "no plans": ({"ringattn": None}, "has no plan"),
}


@pytest.mark.parametrize("case", CALLS)
def test_refused_calls(case: str) -> None:
    model = build("Llama")
    batch = hf.attach(model, 2).shard(IDS)
    values, words = CALLS[case]
    with pytest.raises(UserError) as caught:
        model(**{**batch, **values})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_dropout_and_heads() -> None:
    model = build("Llama", attention_dropout=0.1)
    parallel = hf.attach(model, 2)
    with pytest.raises(UserError, match=r"attention dropout 0\.1"):
        model(**parallel.shard(IDS))
    with pytest.raises(UserError, match="has no loss"):
        hf.loss(model, parallel.shard(IDS))
    model.config.logits_scaling = 2.0
    with pytest.raises(UserError, match="logits_scaling=2.0"):
        hf.loss(model, parallel.shard(IDS, labels=IDS))
    # Nothing runs on simulated ranks.
    model.eval()
    with pytest.raises(UserError, match="needs a process group"):
        model(**parallel.shard(IDS))


BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "one row": ({"input_ids": IDS[0]}, r"\(B, S\)"),
    "labels of others": ({"labels": IDS[:, 1:]}, "shape of input_ids"),
    "documents too short": ({"document_lengths": [4, 5]}, "sum to 48"),
    "no document": ({"document_lengths": [48, 0]}, "positive"),
    "positions of others": ({"position_ids": torch.arange(12)}, "48 tokens"),
    "positions of three axes": ({"position_ids": IDS.expand(3, 1, 48)}, r"\[3, 1, 48\]"),
    "positions of other rows": ({"position_ids": IDS.expand(2, 48)}, "1 rows of 48"),
    "a rank without tokens": ({"input_ids": IDS[:, :1]}, "without tokens"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_refused_batches(case: str) -> None:
    values, words = BATCHES[case]
    parallel = hf.attach(build("Llama"), 2)
    with pytest.raises(UserError, match=words):
        parallel.shard(**{"input_ids": IDS, **values})


def test_transformers_is_not_imported_unasked() -> None:
    path = Path(hf.__file__)
    found = [one for one in imports(path.read_text()) if one.name == "transformers"]
    assert found
    assert all(one.lazy for one in found)
