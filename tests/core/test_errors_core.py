"""Bad input to the core: one line with the value, the rule and the fix, before any work starts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringattn as ra
from ringattn import UserError, layouts, masks
from tests.ranks import run_ranks

S = 64


def _too_many_tiles() -> None:
    """A million tokens dealt one by one to 64 ranks, in 600 documents."""
    mask = masks.documents([1747] * 600, causal=True)
    ra.ContextParallel(64, heads=(4, 1), head_dim=8, method="direct", layout="striped").plan(mask)


def _context(group: Any = 2, **options: Any) -> ra.ContextParallel:
    return ra.ContextParallel(group, **({"heads": (4, 1), "head_dim": 8} | options))


def _plan(**options: Any) -> ra.Plan:
    return _context(**options).plan(masks.causal(S))


def _simulate(
    options: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> ra.Simulated:
    tensors = {"q": (1, S, 4, 8), "k": (1, S, 1, 8), "v": (1, S, 1, 8), "dout": (1, S, 4, 8)}
    made: dict[str, Any] = {
        name: torch.zeros(shape, dtype=dtype) for name, shape in tensors.items()
    }
    for name, value in changes.items():
        made[name] = torch.zeros(value, dtype=dtype) if isinstance(value, tuple) else value
    return ra.simulate(_plan(**(options or {})), **made)


def _on_meta() -> dict[str, Any]:
    heads = {"q": 4, "k": 1, "v": 1}
    return {name: torch.zeros(1, S, h, 8, device="meta") for name, h in heads.items()}


Bad = tuple[str, Callable[[], Any], str, str]  # id, what is done, the value, the rule
BAD: list[Bad] = [
    ("no tokens", lambda: masks.full(0), "seq_len=0", "positive integer"),
    ("half a token", lambda: masks.causal(3.5), "seq_len=3.5", "positive integer"),  # type: ignore[arg-type]
    ("a flag for a count", lambda: masks.full(True), "seq_len=True", "positive integer"),
    ("no documents", lambda: masks.documents([], True), "lengths=[]", "positive integers"),
    ("an empty document", lambda: masks.documents([3, 0], True), "[3, 0]", "positive integers"),
    ("a negative length", lambda: masks.shared_question([3, -1]), "[3, -1]", "positive integers"),
    ("a long list", lambda: masks.documents([-1] * 999, False), "...", "positive integers"),
    ("a negative window", lambda: masks.sliding_window(8, -1, 0), "left=-1", ">= 0"),
    ("a negative width", lambda: masks.global_sliding(8, -2), "width=-2", ">= 0"),
    ("a negative prefix", lambda: masks.prefix_lm(8, -1), "prefix=-1", ">= 0"),
    ("no window", lambda: masks.documents([8], True, 0), "window=0", "positive"),
    ("two sides", lambda: masks.documents([8], False, 3), "window=3", "causal"),
    ("a block of nothing", lambda: masks.block_causal_documents([8], 0), "block=0", "positive"),
    ("a window of nothing", lambda: masks.streaming(8, 1, 0), "window=0", "positive"),
    ("no stride", lambda: masks.dual_scope(8, 2, 1, 0), "stride=0", "positive"),
    ("a child before its parent", lambda: masks.prefix_tree([1, 2], [1, -1]), "[1, -1]", "earlier"),
    ("a parent too few", lambda: masks.prefix_tree([1, 2], [-1]), "[-1]", "earlier segment"),
    ("a window beyond the grid", lambda: masks.neighborhood((4, 4), 5), "window=5", "<= extent"),
    ("four axes", lambda: masks.neighborhood((2, 2, 2, 2), 1), "(2, 2, 2, 2)", "1 to 3"),
    ("a stride beyond the window", lambda: masks.neighborhood((8,), 2, stride=3), "stride=3", "2"),
    ("too few windows", lambda: masks.neighborhood((8, 8, 8), (2, 2)), "(2, 2)", "or 3"),
    ("too few causal axes", lambda: masks.neighborhood((8, 8), 2, causal=(True,)), "(True,)", "2"),
    ("a tile beside the grid", lambda: masks.neighborhood((8,), 4, tile=(3,)), "(3,)", "divide"),
    (
        "too many bands",
        lambda: masks.neighborhood((30, 48, 80), (30, 48, 9)),
        "bands",
        "tile-major order",
    ),
    (
        "a band beyond the sequence",
        lambda: masks.from_bands(8, [(0, 9, 0, 8, 0, 0, 1)]),
        "(0, 9, 0, 8, 0, 0, 1)",
        "[0, seq_len=8)",
    ),
    (
        "overlapping bands",
        lambda: masks.from_bands(8, [(0, 8, 0, 8, 0, 0, 1), (1, 2, 0, 8, -9, 9, 1)]),
        "bands 0 and 1",
        "overlap",
    ),
    ("no ranks", lambda: _context(0), "group=0", ">= 1"),
    ("no process group", lambda: _context(None), "group=None", "not initialised"),
    ("heads that do not divide", lambda: _context(heads=(4, 3)), "(4, 3)", "multiple"),
    ("half a head", lambda: _context(heads=(4.5, 1.5)), "(4.5, 1.5)", "multiple"),
    ("no heads", lambda: _context(heads=None), "heads=None", "query heads"),
    ("a large head dim", lambda: _context(head_dim=300), "head_dim=300", "1 to 256"),
    ("three head dims", lambda: _context(head_dim=(8, 8, 8)), "(8, 8, 8)", "1 to 256"),
    ("integers", lambda: _context(dtype=torch.int32), "torch.int32", "bfloat16"),
    (
        "a third wire dtype",
        lambda: _context(dtype=torch.bfloat16, wire_dtype=torch.float16),
        "wire_dtype=torch.float16",
        "torch.float32 or the input dtype",
    ),
    ("a plan of too many tiles", _too_many_tiles, "tiles", "at most"),
    (
        "a mask in place of a plan",
        lambda: ra.attention(*[torch.zeros(1, 4, 2, 8)] * 3, masks.causal(4)),  # type: ignore[arg-type]
        "plan=",
        "ringattn.Plan",
    ),
    (
        "attention dropout",
        lambda: ra.attention(*[torch.zeros(1, 4, 2, 8)] * 3, None, dropout=0.1),  # type: ignore[arg-type]
        "dropout=0.1",
        "random stream",
    ),
    ("an unknown method", lambda: _context(method="rign"), "'rign'", "ring, burst"),
    ("an unknown layout", lambda: _context(layout="zig"), "'zig'", "zigzag"),
    ("a layout that is none", lambda: _context(layout=3), "layout=3", "zigzag"),
    ("an unknown kernel", lambda: _context(kernel="fast"), "'fast'", "cpu_flash"),
    ("a layout of other ranks", lambda: _context(layout=layouts.zigzag(S, 4)), "4 ranks", "2"),
    ("a layout of other tokens", lambda: _plan(layout=layouts.zigzag(60, 2)), "60 tokens", "64"),
    ("nodes without ranks", lambda: _context(ranks_per_node=0), "ranks_per_node=0", "positive"),
    ("negative stages", lambda: _context(options={"stages": -1}), "stages=-1", "positive"),
    ("a timeout in seconds", lambda: _context(timeout=5), "timeout=5", "timedelta"),
    ("too little memory", lambda: _plan(memory_limit=10), "memory_limit=10", "bytes"),
    ("a number for a mask", lambda: _context().plan(S), "mask=64", "ringattn.Mask"),  # type: ignore[arg-type]
    ("a sequence too short", lambda: _plan().shard(torch.zeros(1, 63)), "63 tokens", "64"),
    ("a rank too many", lambda: _plan().shard(torch.zeros(1, S), rank=2), "rank=2", "2 ranks"),
    ("positions of no rank", lambda: _plan().positions(-1), "rank=-1", "2 ranks"),
    ("bytes of no rank", lambda: _plan().bytes(7, "forward"), "rank=7", "2 ranks"),
    ("a third direction", lambda: _plan().bytes(0, "sideways"), "'sideways'", "forward"),  # type: ignore[arg-type]
    (
        "unshard of simulated ranks",
        lambda: _plan().unshard(torch.zeros(1, 32)),
        "2 simulated",
        "process group",
    ),
    ("too few queries", lambda: _simulate(q=(1, 63, 4, 8)), "(1, 63, 4, 8)", "64"),
    ("other query heads", lambda: _simulate(q=(1, S, 3, 8)), "(1, 64, 3, 8)", "(B, 64, 4, 8)"),
    ("expanded keys", lambda: _simulate(k=(1, S, 4, 8)), "k of shape", "(B, 64, 1, 8)"),
    ("another value dim", lambda: _simulate(v=(1, S, 1, 9)), "v of shape", "(B, 64, 1, 8)"),
    ("another batch", lambda: _simulate(k=(2, S, 1, 8)), "(2, 64, 1, 8)", "(B, 64, 1, 8)"),
    ("no batch dim", lambda: _simulate(q=(S, 4, 8)), "(64, 4, 8)", "(B, 64, Hq, D)"),
    ("another gradient", lambda: _simulate(dout=(1, S, 4, 9)), "(1, 64, 4, 9)", "(1, 64, 4, 8)"),
    ("too few sinks", lambda: _simulate(sinks=(3,)), "(3,)", "one logit per query head"),
    ("integer tensors", lambda: _simulate(dtype=torch.int32), "torch.int32", "float64"),
    (
        "a dtype that was not planned",
        lambda: _simulate({"dtype": torch.bfloat16}),
        "torch.float32",
        "torch.bfloat16",
    ),
    (
        "two dtypes",
        lambda: _simulate(k=torch.zeros(1, S, 1, 8, dtype=torch.float64)),
        "torch.float64",
        "torch.float32",
    ),
    (
        "another device",
        lambda: _simulate(**_on_meta()),
        "meta",
        "cpu",
    ),
    (
        "a softcap on the flash op",
        lambda: _simulate({"kernel": "cpu_flash"}, softcap=1.0),
        "cpu_flash",
        "softcap 1.0",
    ),
]


def _assert_one_line(error: UserError, value: str, rule: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 300
    assert text == f"{error.what}: {error.rule}; {error.fix}"
    assert value in error.what, text
    assert rule in text.removeprefix(error.what), text
    assert len(error.fix) > 5


@pytest.mark.parametrize(
    "value, action, rule", [(b[2], b[1], b[3]) for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input_is_refused_in_one_line(value: str, action: Callable[[], Any], rule: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    _assert_one_line(caught.value, value, rule)


def test_numpy_counts_are_counts() -> None:
    assert masks.sliding_window(np.int64(8), np.int32(2), np.int64(0)).seq_len == 8  # type: ignore[arg-type]


def _bad_calls(rank: int, world: int, group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """(value, message) of bad calls on real ranks; none of them may communicate."""
    plan = _context(group, dtype=torch.float32, layout="contiguous").plan(masks.causal(S))
    own = S // world
    good = {"q": torch.zeros(1, own, 4, 8), "k": torch.zeros(1, own, 1, 8)}

    def attend(
        softcap: float | None = None, scale: float | None = None, **changes: torch.Tensor
    ) -> torch.Tensor:
        x = good | {"v": good["k"]} | changes
        sinks = x.pop("sinks", None)
        return ra.attention(x["q"], x["k"], x["v"], plan, scale=scale, softcap=softcap, sinks=sinks)

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "cp"))
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("(1, 64, 4, 8)", lambda: attend(q=torch.zeros(1, S, 4, 8))),
        ("torch.float64", lambda: attend(k=good["k"].double())),
        ("softcap=-1.0", lambda: attend(softcap=-1.0)),
        ("softcap=inf", lambda: attend(softcap=float("inf"))),
        ("scale=0.0", lambda: attend(scale=0.0)),
        ("scale=nan", lambda: attend(scale=float("nan"))),
        ("(4, 1)", lambda: attend(sinks=torch.zeros(4, 1))),
        ("64 tokens", lambda: plan.unshard(torch.zeros(1, S, 4))),
        ("('dp', 'cp')", lambda: _context(mesh)),
        ("'world'", lambda: _context("world")),
        ("plan handle 999", lambda: torch.ops.ringattn.attention(
            good["q"], good["k"], good["k"], None, 999, 1.0, 0.0)),
    ]  # fmt: skip
    messages = []
    if rank > 0:  # a refusal must not need the other ranks
        return messages
    for value, call in calls:
        try:
            call()
        except UserError as error:
            messages.append((value, str(error)))
        else:
            messages.append((value, "accepted"))
    return messages


def test_bad_calls_are_refused_on_one_rank_without_the_others() -> None:
    messages = run_ranks(2, _bad_calls)[0]
    assert len(messages) == 11
    for value, message in messages:
        assert value in message
        assert "\n" not in message
