"""The attention operator: fake shapes, compile, checkpointing, and how long a plan lives."""

import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn import UserError, masks
from ringattn.operators import attention
from tests.closeness import assert_close
from tests.core.cases import Inputs, inputs, mask_of
from tests.core.exactness import TOLERANCE
from tests.ranks import run_ranks

MASK = "documents_causal"
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _context(group: dist.ProcessGroup | int, **options) -> ra.ContextParallel:
    settings = {"heads": (4, 1), "head_dim": 8, "method": "ring", "layout": "zigzag"}
    return ra.ContextParallel(group, **(settings | options))


def _gradients(plan: ra.Plan, x: Inputs, attend: Attend) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank through `attend`."""
    q, k, v = (plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    out = attend(q, k, v)
    out.backward(plan.shard(x.dout))
    tensors = [out.detach(), q.grad, k.grad, v.grad]
    assert all(t is not None for t in tensors)
    return [t for t in tensors if t is not None]


def _assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), a, b, strict=True):
        assert torch.equal(x, y), name


def _opcheck(rank: int, world: int, group: dist.ProcessGroup) -> None:
    del rank, world
    plan = _context(group).plan(mask_of(MASK))
    x = inputs(plan.mask.seq_len, 4, 2, "matmul+sinks")
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    assert x.sinks is not None
    sinks = x.sinks.clone().requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for extra in (None, sinks):
        arguments = (q, k, v, extra, plan.handle, 0.35, 0.0)
        torch.library.opcheck(torch.ops.ringattn.attention.default, arguments, test_utils=checks)
    out, lse, _ = plan.run_forward(x.q, x.k, x.v, None, 0.35, None)
    dlse = torch.zeros_like(lse)
    arguments = (x.dout, dlse, x.q, x.k, x.v, out, lse, None, plan.handle, 0.35, 0.0)
    torch.library.opcheck(
        torch.ops.ringattn.attention_backward.default, arguments, test_utils=checks
    )


def test_the_operator_keeps_its_registrations_promises() -> None:
    run_ranks(1, _opcheck)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fake_results_have_the_real_shapes_and_dtypes(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        q, k, v = (torch.empty(2, 5, h, d, dtype=dtype) for h, d in ((4, 16), (1, 16), (1, 8)))
    out, lse, _ = torch.ops.ringattn.attention(q, k, v, None, 0, 1.0, 0.0)
    assert (out.shape, out.dtype) == ((2, 5, 4, 8), dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert (lse.shape, lse.dtype) == ((2, 5, 4), exact)


def _compiled(rank: int, world: int, group: dist.ProcessGroup) -> int:
    """A compiled layer equals the eager one for a dozen plans; returns the graphs compiled."""
    del rank, world
    context = _context(group)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: ra.Plan) -> torch.Tensor:
        return ra.attention(q * 1.5, k, v.sin(), plan).cos()

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(64, 4, 1)
    for cut in range(1, 13):
        plan = context.plan(masks.documents([cut, 64 - cut], causal=True))
        eager = _gradients(plan, x, lambda q, k, v, plan=plan: layer(q, k, v, plan))
        _assert_same(_gradients(plan, x, lambda q, k, v, plan=plan: compiled(q, k, v, plan)), eager)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("world", [1, 2])
def test_compiled_code_gives_the_same_bits(world: int) -> None:
    """One whole graph, and a second one for any plan: a new mask per batch compiles nothing."""
    for graphs in run_ranks(world, _compiled):
        assert 1 <= graphs <= 2


def _checkpointed(rank: int, world: int, group: dist.ProcessGroup) -> None:
    del rank, world
    plan = _context(group, method="direct").plan(mask_of(MASK))
    x = inputs(plan.mask.seq_len, 4, 2)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 1.5, k, v.sin(), plan)

    eager = _gradients(plan, x, layer)
    for reentrant in (False, True):
        _assert_same(
            _gradients(plan, x, lambda *t, r=reentrant: checkpoint(layer, *t, use_reentrant=r)),
            eager,
        )


def test_activation_checkpointing_gives_the_same_bits() -> None:
    run_ranks(2, _checkpointed)


def _plan_dies_first(rank: int, world: int, group: dist.ProcessGroup) -> str:
    del rank, world
    x = inputs(67, 4, 1)
    want = ra.reference(x.q, x.k, x.v, mask_of(MASK), x.dout)
    context = _context(group)
    plan = context.plan(mask_of(MASK))
    handle, shard = plan.handle, plan.shard(x.dout)
    q, k, v = (plan.shard(t).requires_grad_() for t in (x.q, x.k, x.v))
    out = ra.attention(q, k, v, plan)
    assert want.dq is not None
    expected = plan.shard(want.dq)
    del plan, context
    gc.collect()
    out.backward(shard)
    assert q.grad is not None
    assert_close("dq", expected, q.grad, TOLERANCE)
    del out
    gc.collect()
    try:
        torch.ops.ringattn.attention(q, k, v, None, handle, 1.0, 0.0)
    except UserError as error:
        return str(error)
    return "the plan still lives"


def test_what_autograd_saved_keeps_the_plan_alive_and_nothing_else_does() -> None:
    for message in run_ranks(2, _plan_dies_first):
        assert "names no live plan" in message


def _noncontiguous(rank: int, world: int, group: dist.ProcessGroup) -> None:
    """Heads-first inputs seen as (B, T, H, D), an expanded batch, a strided head dim."""
    del rank, world
    for kernel in ("cpu_flash", "matmul"):
        plan = _context(group, kernel=kernel).plan(mask_of(MASK))
        x = inputs(plan.mask.seq_len, 4, 2)
        q, k, v, dout = (plan.shard(t) for t in x.tensors)
        k, dout = k[:1].expand_as(k), dout[:1].expand_as(dout)
        views = [
            q.transpose(1, 2).contiguous().transpose(1, 2),
            k,
            torch.stack([v, v], dim=-1).flatten(-2)[..., ::2],
        ]
        assert not any(t.is_contiguous() for t in views)
        results = []
        for inputs_ in ([t.contiguous() for t in (q, k, v)], views):
            leaves = [t.detach().requires_grad_() for t in inputs_]
            out = ra.attention(leaves[0], leaves[1], leaves[2], plan)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
        for name, plain, strided in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            assert_close(f"{kernel} {name}", plain, strided, TOLERANCE)


def test_inputs_need_not_be_contiguous() -> None:
    run_ranks(2, _noncontiguous)


def _partial_gradients(rank: int, world: int, group: dist.ProcessGroup) -> None:
    """Only some inputs ask for a gradient; without any, no graph is kept."""
    del rank, world
    plan = _context(group).plan(mask_of(MASK))
    x = inputs(plan.mask.seq_len, 4, 1)
    q, k, v, dout = (plan.shard(t) for t in x.tensors)
    assert not ra.attention(q, k, v, plan).requires_grad
    with torch.no_grad():
        assert not ra.attention(q.requires_grad_(), k, v, plan).requires_grad
    every = _gradients(plan, x, lambda q, k, v: ra.attention(q, k, v, plan))
    v = v.detach().requires_grad_()
    (dv,) = torch.autograd.grad(ra.attention(q.detach(), k, v, plan), v, dout)
    assert torch.equal(dv, every[3])


def test_gradients_of_some_inputs_only() -> None:
    run_ranks(2, _partial_gradients)


def _gradcheck(rank: int, world: int, group: dist.ProcessGroup) -> None:
    """Finite differences of the whole operator, its lse included, on one rank."""
    del rank, world
    mask = masks.documents([3, 2], causal=True)
    plan = _context(group, heads=(2, 1), head_dim=(3, 2), kernel="matmul").plan(mask)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    tensors = draw(1, 5, 2, 3), draw(1, 5, 1, 3), draw(1, 5, 1, 2), draw(2)
    for softcap in (0.0, 1.5):
        torch.autograd.gradcheck(
            lambda *t, cap=softcap: torch.ops.ringattn.attention(*t, plan.handle, 0.6, cap), tensors
        )


def test_gradients_are_those_of_finite_differences() -> None:
    run_ranks(1, _gradcheck)


def test_plans_are_cached_by_mask() -> None:
    context = _context(3)
    plan = context.plan(masks.causal(48))
    assert context.plan(masks.causal(48)) is plan
    assert context.plan(masks.causal(49)) is not plan
    assert _context(3).plan(masks.causal(48)).digest == plan.digest
    for length in range(50, 150):
        context.plan(masks.causal(length))
    again = context.plan(masks.causal(48))
    assert again is not plan  # the oldest plans were let go
    assert again.digest == plan.digest
