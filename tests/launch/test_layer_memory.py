"""Checkpointing, tiles, offload and compilation change what is kept, never what is computed."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import ringattn as ra
from ringattn import UserError
from ringattn.benchmarks.linear_loss import peak_bytes
from ringattn.launch.config_load import config_from_values
from ringattn.launch.feed import PlanAttend
from ringattn.launch.layer_memory import apply_memory, parameters_of_halves
from ringattn.launch.layers import DecoderLayer
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.rope import rope_table
from ringattn.plan import Plan
from ringattn.selective import cheap_part
from tests.closeness import assert_close
from tests.pairwise import pairwise
from tests.ranks import run_ranks

SHAPE = ModelConfig(
    vocab_size=61, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=48
)  # fmt: skip
DOCUMENTS = [70, 1, 40, 19]
MODES = ["none", "full", "attention", "sequence"]
Result = dict[str, torch.Tensor]


def _possible(case: dict[str, Any]) -> bool:
    return not (case["memory.offload"] and case["memory.checkpointing"] == "none")


CASES = pairwise(
    {
        "memory.checkpointing": MODES,
        "memory.token_tile": [None, 32, 500],
        "memory.offload": [False, True],
        "train.compile": [False, True],
        "dtype": [torch.float64, torch.bfloat16],
        "layout": ["zigzag", "uneven"],
    },
    _possible,
)


def _model(
    case: dict[str, Any], dtype: torch.dtype = torch.float32, shape: ModelConfig = SHAPE
) -> tuple[Transformer, Any]:
    model = Transformer(shape)
    init_weights(model, 3)
    with torch.no_grad():  # so that attention and norms matter
        for parameter in model.parameters():
            parameter *= 4 if parameter.dim() > 1 else 1
    settings = {key: value for key, value in case.items() if "." in key}
    return model.to(dtype), apply_memory(model, config_from_values(settings))


def _plan(group: Any, world: int, layout: str = "zigzag") -> Plan:
    total = sum(DOCUMENTS)
    chosen: Any = layout
    if layout == "uneven":  # a rank owns nothing where there are two
        chosen = ra.layouts.contiguous(total, world, [total, *[0] * (world - 1)])
    context = ra.ContextParallel(group, heads=(4, 2), head_dim=8, method="direct", layout=chosen)
    return context.plan(ra.masks.documents(DOCUMENTS, causal=True))


def _step(model: Transformer, plan: Plan, dtype: torch.dtype) -> Result:
    """Loss and gradients of this rank's tokens; a fresh graph every time."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(61, (2, 1, sum(DOCUMENTS)), generator=generator)
    x, y = plan.shard(tokens), plan.shard(labels)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(x, plan.positions(), PlanAttend(plan), labels_BT=y)
    loss.backward()
    found: Result = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def _eager_graphs() -> Any:
    """Dynamo and autograd as in earnest, without a C++ compiler."""
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))


def _compare(rank: int, world: int, group: dist.ProcessGroup, cases: list[dict]) -> None:
    del rank
    torch.compiler.reset()
    for case in cases:
        dtype = case["dtype"]
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        plan = _plan(group, world, case["layout"])
        want = _step(_model({}, kind)[0], plan, dtype)
        with _eager_graphs():
            model, store = _model(case, kind)
            again = [_step(model, plan, dtype) for _ in range(2)]
        same = case["memory.token_tile"] is None and not case["train.compile"]
        same = same and case["memory.checkpointing"] != "sequence"
        tolerance = 1e-11 if kind == torch.float64 else 2e-2
        for got in again:
            for name, value in want.items():
                if same:
                    assert torch.equal(value, got[name]), f"{case}: {name}"
                assert_close(f"{case} {name}", value, got[name], tolerance)
        assert store is None or store.device_bytes == 0


def _cases_of(world: int) -> list[dict[str, Any]]:
    """Compiling takes long: few cases, one with a rank without tokens; `--full` has all."""
    wide = [c for c in CASES if c["train.compile"] and c["dtype"] == torch.float64]
    if world == 1:
        return wide
    uneven = next((case for case in wide if case["layout"] == "uneven"), wide[0])
    return [uneven, *(case for case in CASES if not case["train.compile"])]


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_those_of_no_checkpointing(world: int) -> None:
    run_ranks(world, _compare, _cases_of(world))


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_of_all_cases(world: int) -> None:
    run_ranks(world, _compare, CASES)


def _runs(rank: int, world: int, group: dist.ProcessGroup) -> tuple[dict[str, list[int]], int]:
    """Areas of the forwards that a step runs, per mode, and of the cheap rows."""
    del rank
    plan = _plan(group, world)
    cheap = cheap_part(plan, 0.3).plan
    assert cheap is not None
    found: dict[str, list[int]] = {}
    forward = Plan.run_forward
    for mode in MODES:
        areas: list[int] = []

        def counted(self: Plan, *arguments: Any, areas: list[int] = areas) -> Any:
            areas.append(self.mask.area)
            return forward(self, *arguments)

        model, _ = _model({"memory.checkpointing": mode, "memory.recompute": 0.3})
        with mock.patch.object(Plan, "run_forward", counted):
            _step(model, plan, torch.float32)
        found[mode] = areas
    return found, cheap.mask.area


def test_how_often_attention_runs() -> None:
    whole = ra.masks.documents(DOCUMENTS, causal=True).area
    for areas, cheap in run_ranks(2, _runs):
        assert 0.2 * whole < cheap < 0.4 * whole  # at most 0.3 of the busiest rank's, from each
        assert areas["none"] == areas["attention"] == [whole] * SHAPE.layers
        assert areas["full"] == [whole] * 2 * SHAPE.layers
        assert areas["sequence"] == [whole] * SHAPE.layers + [cheap] * SHAPE.layers


@pytest.fixture
def one_rank() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def test_memory_falls(one_rank: dist.ProcessGroup) -> None:
    """Traced peaks of a forward; attention keeps out and lse more than full, sequence less."""
    deep, length = replace(SHAPE, layers=6), 768
    context = ra.ContextParallel(one_rank, heads=(4, 2), head_dim=8)
    plan = context.plan(ra.masks.causal(length))
    cheap_part(plan, 0.25)
    tokens = torch.arange(length)[None] % 61

    def peak(mode: str, tile: int | None = None) -> int:
        values = {"memory.checkpointing": mode, "memory.token_tile": tile}
        model, _ = _model(values, shape=deep)

        def forward() -> torch.Tensor:
            return model(tokens, plan.positions(), PlanAttend(plan), labels_BT=tokens)

        forward()
        return peak_bytes(forward, "cpu")

    peaks = {mode: peak(mode) for mode in MODES}
    # Floats per token: out 32, lse 4; half of the rows are cheap. At the peak, in the last layer,
    # that layer has its own in every mode.
    kept = 4 * length * (deep.layers - 1) * 36
    assert 0.9 < (peaks["attention"] - peaks["full"]) / kept < 1.1
    assert 0.4 < (peaks["sequence"] - peaks["full"]) / kept < 0.6
    assert peaks["attention"] < peak("none", 64) < 0.6 * peaks["none"]


def test_parameters_of_the_halves() -> None:
    found = parameters_of_halves(Transformer(SHAPE))
    layer = DecoderLayer(SHAPE)
    assert sorted(n for names in found.values() for n in names) == sorted(
        name for name, _ in layer.named_parameters()
    )
    assert "mlp.gate_proj.weight" in found["after_attention"]
    assert "input_layernorm.weight" in found["attention_inputs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_layers_share_one_compilation(one_rank: dist.ProcessGroup) -> None:
    """In earnest: one graph per half for all layers and numbers of tokens, no break."""
    torch.compiler.reset()
    counters.clear()
    model, _ = _model({"memory.checkpointing": "full", "train.compile": True})
    plain, _ = _model({})
    context = ra.ContextParallel(one_rank, heads=(4, 2), head_dim=8)
    for length in (50, 33, 64):
        plan = context.plan(ra.masks.causal(length))
        tokens = torch.arange(length)[None] % 61
        got, want = (
            torch.autograd.grad(
                m(tokens, plan.positions(), PlanAttend(plan), labels_BT=tokens.roll(1)),
                list(m.parameters()),
            )
            for m in (model, plain)
        )
        for a, b in zip(want, got, strict=True):
            assert_close(f"{length}", a, b, 1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_a_whole_layer_is_one_graph(one_rank: dist.ProcessGroup) -> None:
    """The attention operator may stand inside compiled code."""
    torch.compiler.reset()
    counters.clear()
    layer = DecoderLayer(SHAPE)
    plan = _plan(one_rank, 1)
    rope = rope_table(plan.positions(), SHAPE)
    x = torch.randn(1, sum(DOCUMENTS), SHAPE.dim, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    outs = [f(x, rope, PlanAttend(plan)) for f in (layer, compiled)]
    want, got = (torch.autograd.grad(o.sin().sum(), [x, *layer.parameters()]) for o in outs)
    for a, b in zip(want, got, strict=True):
        assert_close("gradient", a, b, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_attention_of_another_kind_cannot_be_recalled() -> None:
    model, _ = _model({"memory.checkpointing": "attention"})
    tokens = torch.zeros(1, 4, dtype=torch.int64)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q

    with pytest.raises(UserError, match="checkpointing=full"):
        model(tokens, torch.arange(4), attend)
    with torch.no_grad():
        model(tokens, torch.arange(4), attend)  # nothing is kept
