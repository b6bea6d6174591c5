"""Blocks selected at run time: which ones, on any sharding, in any dtype, and in training."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import ringattn as ra
from ringattn import Mask, UserError, layouts, masks
from ringattn.routing import average, candidates_of, select, select_whole, selecting_heads
from tests.core.cases import LAYOUTS
from tests.ranks import run_ranks

SEQ_LEN, HEADS, KV_HEADS, DIM = 61, 4, 2, 8
MASKS = {
    "causal": lambda: masks.routed(masks.causal(SEQ_LEN), block_k=5, top_k=4),
    "per_head": lambda: masks.routed(
        masks.documents([40, 21], causal=True), block_q=8, block_k=4, top_k=3, per_head=True
    ),
    "full": lambda: masks.routed(masks.full(SEQ_LEN), block_q=3, block_k=7, top_k=4),
    "rows": lambda: masks.routed(masks.causal(SEQ_LEN), block_q=1, block_k=6, top_k=2),
    "all": lambda: masks.routed(masks.causal(SEQ_LEN), block_k=16, top_k=9),
}


def _inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM), (HEADS, DIM)]
    return [
        torch.randn(2, SEQ_LEN, *s, dtype=torch.float64, generator=generator).to(dtype)
        for s in shapes
    ]


def _written_out(q: torch.Tensor, k: torch.Tensor, mask: Mask) -> list:
    """The selection by loops: blocks of keys of each (batch, selecting head, block of queries)."""
    matrix, routing, allowed = mask.matrices[0], mask.routing, mask.dense()
    assert routing is not None
    q_spans, k_spans = ([slice(a, b) for a, b in pairwise(e)]
                        for e in (matrix.q_edges, matrix.k_edges))  # fmt: skip
    heads = HEADS if routing.per_head else KV_HEADS
    result = []
    for batch, head, rows in product(range(2), range(heads), q_spans):
        members = range(head * HEADS // heads, (head + 1) * HEADS // heads)
        query = q[batch, rows][:, list(members)].mean((0, 1))
        scored = []
        for number, keys in enumerate(k_spans):
            if allowed[rows, keys].any():
                score = float(query @ k[batch, keys, head * KV_HEADS // heads].mean(0))
                own = keys.start < rows.stop and rows.start < keys.stop
                scored.append((-math.inf if own else -score, number))
        result.append(sorted(number for _, number in sorted(scored)[: routing.top_k]))
    return result


@pytest.mark.parametrize("name", MASKS)
def test_the_best_blocks_are_selected(name: str) -> None:
    mask = MASKS[name]()
    q, k, _, _ = _inputs()
    got = select_whole(q, k, mask)
    assert got.dtype == torch.int32
    flat = [[b for b in row if b >= 0] for row in got.flatten(0, 2).tolist()]
    assert flat == _written_out(q, k, mask)
    assert all(row == sorted(row) for row in flat)


def test_ties_go_to_the_lower_block() -> None:
    mask = masks.routed(masks.causal(64), block_k=4, top_k=5)
    q, k = torch.ones(1, 64, 2, 4), torch.ones(1, 64, 2, 4)
    got = select_whole(q, k, mask)[0, 0]
    for block in range(16):
        want = sorted({*range(min(4, block)), block})
        assert [b for b in got[block].tolist() if b >= 0] == want


def test_averages_are_added_in_one_order() -> None:
    """As a binary tree, whatever else is averaged beside: other orders round otherwise."""
    rows = torch.randn(1, 3, 11, 1, 1, generator=torch.Generator().manual_seed(0)) * 1e3
    held = torch.ones(3, 11, dtype=torch.bool)
    held[2, 7:] = False
    got = average(rows.clone(), held)
    alone = average(rows[:, 1:2].clone(), held[1:2])
    assert torch.equal(got[:, 1:2], alone)
    values = [float(x) for x in rows[0, 1, :, 0, 0]]
    while len(values) > 1:
        half = -(-len(values) // 2)
        pairs = [np.float32(a) + np.float32(b) for a, b in zip(values, values[half:])]
        values = [float(p) for p in pairs] + values[len(pairs) : half]
    assert float(got[0, 1, 0, 0]) == float(np.float32(values[0]) / np.float32(11))
    assert float(got[0, 2, 0, 0]) == pytest.approx(float(rows[0, 2, :7].mean()), rel=1e-5)


def _selections(
    rank: int, world: int, group: dist.ProcessGroup, cases: list[tuple[str, str, torch.dtype]]
) -> list[torch.Tensor]:
    del rank
    found = []
    for name, layout, dtype in cases:
        mask = MASKS[name]()
        context = ra.ContextParallel(
            group, heads=(HEADS, KV_HEADS), head_dim=DIM, layout=LAYOUTS[layout](mask, world)
        )
        plan = context.plan(mask)
        q, k, _, _ = _inputs(dtype)
        found.append(ra.route(plan.shard(q), plan.shard(k), plan))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_and_every_sharding_selects_the_same(world: int) -> None:
    pairs = list(product(MASKS, LAYOUTS))
    cases = [(*pair, (torch.float32, torch.bfloat16)[i % 2]) for i, pair in enumerate(pairs)]
    by_rank = run_ranks(world, _selections, cases)
    for index, (name, layout, dtype) in enumerate(cases):
        q, k, _, _ = _inputs(dtype)
        want = select_whole(q, k, MASKS[name]())
        for rank, found in enumerate(by_rank):
            assert torch.equal(found[index], want), (name, layout, dtype, rank)


def test_selecting_waits_for_no_value() -> None:
    """Tensors without data pass through: nothing asks the device for one."""
    mask = MASKS["causal"]()
    assert mask.routing is not None
    candidates = candidates_of(mask, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k = torch.empty(2, SEQ_LEN, HEADS, DIM), torch.empty(2, SEQ_LEN, KV_HEADS, DIM)
        heads = selecting_heads(q, KV_HEADS, False)
        held = torch.ones(13, 5, dtype=torch.bool)
        blocks = [
            average(x[:, :1].unsqueeze(2).expand(2, 13, 5, KV_HEADS, DIM).clone(), held)
            for x in (heads, k)
        ]
        got = select(blocks[0], blocks[1], candidates, mask.routing.top_k)
    assert got.shape == (2, KV_HEADS, 13, mask.routing.top_k)


def test_one_plan_serves_every_selection() -> None:
    """Moves do not depend on scores: the same plan is exact for other queries and keys."""
    mask = MASKS["causal"]()
    context = ra.ContextParallel(
        4, heads=(HEADS, KV_HEADS), head_dim=DIM, method="direct", layout="zigzag"
    )
    plan, seen = context.plan(mask), []
    for seed in (0, 1):
        q, k, v, dout = _inputs(seed=seed)
        seen.append(select_whole(q, k, mask))
        got, want = ra.simulate(plan, q, k, v, dout), ra.reference(q, k, v, mask, dout)
        for name in ("out", "dq", "dk", "dv"):
            assert (getattr(got, name) - getattr(want, name)).abs().max() < 1e-12
    assert not torch.equal(seen[0], seen[1])


class _Layer(torch.nn.Module):
    """One attention layer in float64: everything around attention is local to a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.float64)
        self.out = torch.nn.Linear(HEADS * DIM, DIM, dtype=torch.float64)

    def forward(self, x: torch.Tensor, plan: ra.Plan) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, DIM))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        return x + self.out(ra.attention(q, k, v, plan).flatten(2))


def _losses(
    rank: int, world: int, group: dist.ProcessGroup, name: str, layout: str, method: str
) -> list[float]:
    """Losses of a few steps of a two-layer model, and the selected blocks' changes."""
    del rank
    mask = MASKS[name]()
    context = ra.ContextParallel(
        group, heads=(HEADS, KV_HEADS), head_dim=DIM, method=method,
        layout=LAYOUTS[layout](mask, world), dtype=torch.float64,
    )  # fmt: skip
    plan, model = context.plan(mask), torch.nn.ModuleList([_Layer(), _Layer()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(2, SEQ_LEN, DIM, dtype=torch.float64, generator=generator) for _ in "xy")
    losses = []
    for _ in range(5):
        h = plan.shard(x)
        for layer in model:
            h = layer(h, plan)
        loss = (h - plan.shard(y)).square().sum() / y.numel()
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(float(total))
    return losses


@pytest.mark.parametrize("name, layout, method", [
    ("causal", "zigzag", "direct"), ("per_head", "striped", "ulysses"), ("full", "uneven", "burst"),
])  # fmt: skip
def test_training_is_the_same_on_any_number_of_ranks(name: str, layout: str, method: str) -> None:
    alone = run_ranks(1, _losses, name, "contiguous", "ring")[0]
    assert alone[-1] < 0.95 * alone[0], "the model learns"
    for world in (2, 4):
        for losses in run_ranks(world, _losses, name, layout, method):
            assert losses == pytest.approx(alone, rel=1e-10)


def _compiled(rank: int, world: int, group: dist.ProcessGroup) -> None:
    del rank, world
    mask = MASKS["causal"]()
    context = ra.ContextParallel(group, heads=(HEADS, KV_HEADS), head_dim=DIM, layout="zigzag")
    plan = context.plan(mask)
    q, k, v, _ = (plan.shard(x) for x in _inputs(torch.float32))
    torch.compiler.reset()
    layer = torch.compile(
        lambda q, k, v: ra.attention(q, k, v, plan), backend="aot_eager", fullgraph=True
    )
    results = []
    for attend in (lambda q, k, v: ra.attention(q, k, v, plan), layer):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves).square().sum().backward()
        results.append([x.grad for x in leaves])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_a_compiled_layer_has_no_graph_break() -> None:
    run_ranks(2, _compiled)


def _refused(rank: int, world: int, group: dist.ProcessGroup) -> list[str]:
    del rank, world
    shapes = {"heads": (HEADS, KV_HEADS), "head_dim": DIM}
    context = ra.ContextParallel(group, **shapes)
    plan, plain = context.plan(MASKS["causal"]()), context.plan(masks.causal(SEQ_LEN))
    q, k, v, _ = (plan.shard(x) for x in _inputs())
    blocks = ra.route(q, k, plan)
    messages = []
    for attempt in (
        lambda: ra.attention(q, k, v, plan, blocks=blocks[:, :1]),
        lambda: ra.attention(q, k, v, plan, blocks=blocks.long()),
        lambda: ra.attention(q, k, v, plan, blocks=blocks + 99),
        lambda: ra.attention(q, k, v, plan, blocks=torch.zeros_like(blocks)),
        lambda: ra.attention(q, k, v, plan, blocks=blocks.tolist()),  # type: ignore[arg-type]
        lambda: ra.attention(q, k, v, plain, blocks=blocks),
        lambda: ra.route(q, k, plain),
        lambda: ra.route(q[:, 1:], k, plan),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        messages.append(str(error.value))
    return messages


def test_selections_that_do_not_fit_are_refused() -> None:
    reasons = ["must be int32 of shape", "must be int32 of shape", "once, ascending",
               "once, ascending", "must be an int32 tensor", "selects no blocks",
               "selects no blocks", "must be (B, tokens"]  # fmt: skip
    for messages in run_ranks(2, _refused):
        for message, reason in zip(messages, reasons, strict=True):
            assert reason in message
            assert "\n" not in message


def test_a_layout_of_stripes_cuts_every_block() -> None:
    mask = MASKS["causal"]()
    context = ra.ContextParallel(
        4, heads=(HEADS, KV_HEADS), head_dim=DIM, method="ring",
        layout=layouts.striped(SEQ_LEN, 4),
    )  # fmt: skip
    q, k, v, dout = _inputs()
    got, want = ra.simulate(context.plan(mask), q, k, v, dout), ra.reference(q, k, v, mask, dout)
    assert (got.dk - want.dk).abs().max() < 1e-12  # type: ignore[operator]
