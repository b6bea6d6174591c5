"""The figures that a kernel is chosen by, against counts over dense masks; choices of a plan."""

from typing import Any

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn import plan as plan_module
from ringattn.errors import UserError
from ringattn.executor import backward_home, forward_home
from ringattn.kernels import MatmulKernel
from ringattn.kernels.measured import Row, Table
from ringattn.kernels.select import choose_kernels
from ringattn.schedule import Direction
from ringattn.workload import BLOCK, work_of

S = 4 * BLOCK
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
RNG = np.random.default_rng(3)
MASKS = {
    "full": (ra.masks.full(S), True),
    "causal": (ra.masks.causal(S), True),
    "documents": (ra.masks.documents([300, 200, 12], causal=False), True),
    "documents_causal": (ra.masks.documents([128, 256, 128], causal=True), True),
    "window": (ra.masks.sliding_window(S, 99, 0), False),
    "shared_question": (ra.masks.shared_question([130, 260, 122]), False),
    "prefix_lm": (ra.masks.prefix_lm(S, 2 * BLOCK), False),
    "streaming": (ra.masks.streaming(S, 10, 60), False),
    "blocks": (ra.masks.blocks(RNG.random((8, 8)) < 0.4, 64, 64), False),
    "dual_scope": (ra.masks.dual_scope(S, 64, 5, 16), False),
    "per_head": (ra.masks.per_head([(2, ra.masks.causal(S)), (2, ra.masks.full(S))]), False),
}


def context(world: int = 1, **changes: Any) -> ra.ContextParallel:
    arguments: dict[str, Any] = {
        "heads": (4, 2), "head_dim": (16, 8), "method": "ring", "layout": "contiguous", **changes,
    }  # fmt: skip
    return ra.ContextParallel(world, **arguments)


@pytest.mark.parametrize("name", MASKS)
def test_the_figures_are_those_of_the_mask(name: str) -> None:
    mask, is_plain = MASKS[name]
    plan = context().plan(mask)
    dense = mask.dense()
    heads = np.broadcast_to(dense, (4, S, S)) if dense.ndim == 2 else dense
    for direction, flops in zip(DIRECTIONS, (2 * (16 + 8), 2 * (3 * 16 + 2 * 8))):
        work = work_of(plan.schedule(direction), 0)
        assert work is not None
        assert (work.direction, work.group, work.qk_dim, work.v_dim) == (direction, 2, 16, 8)
        assert work.flops == flops * heads.sum()
        assert work.plain == is_plain
        assert work.blocks == (name == "blocks")
        tasks = plan.schedule(direction).tasks
        assert work.tile_pairs == tasks["area"].mean()
        visits = sum((t["h1"] - t["h0"]) * len(range(t["q0"], t["q1"], t["stride"])) for t in tasks)
        assert work.keys_per_row == heads.sum() / visits


@pytest.mark.parametrize("name", ["full", "causal", "documents_causal", "window", "prefix_lm"])
def test_fill_is_the_share_of_touched_blocks_that_counts(name: str) -> None:
    mask, _ = MASKS[name]
    work = work_of(context().plan(mask).forward, 0)
    assert work is not None
    cells = mask.dense().reshape(S // BLOCK, BLOCK, S // BLOCK, BLOCK)
    touched = cells.any((1, 3)).sum() * BLOCK**2
    assert work.fill == pytest.approx(mask.area / touched, rel=0.15)


def test_ranks_without_work_have_none() -> None:
    mask = ra.masks.from_bands(S, [(0, 100, 0, 100, -1000, 0, 1)])
    plan = context(2).plan(mask)
    assert work_of(plan.forward, 0) is not None
    assert work_of(plan.forward, 1) is None


def test_flops_are_those_of_a_launch() -> None:
    plan = context(2).plan(ra.masks.full(S))
    work = work_of(plan.forward, 1)
    assert work is not None
    assert work.flops * 2 == 48 * 4 * S * S // 2
    assert work.plain


class Picky(MatmulKernel):
    """A kernel that refuses tiles, which it sees in `prepare` alone."""

    def prepare(self, tiles, device, blocks=None):
        raise UserError("tiles", "are not to my taste", "choose another kernel")


def homes(plan: ra.Plan) -> dict[str, Any]:
    q, dout = torch.randn(1, S, 4, 16), torch.randn(1, S, 4, 8)
    k, v = torch.randn(1, S, 2, 16), torch.randn(1, S, 2, 8)
    lse = torch.zeros(1, S, 4)
    return {
        "forward": forward_home(q, k, v, None),
        "backward": backward_home(dout, q, k, v, lse, lse),
    }


@pytest.mark.parametrize("faster", ["forward", "backward"])
def test_directions_of_a_plan_take_their_own_kernels(
    faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = context(head_dim=16).plan(ra.masks.causal(S))
    rows = []
    for direction in DIRECTIONS:
        work = work_of(plan.schedule(direction), 0)
        assert work is not None
        flash = 2.0 if direction == faster else 0.5
        rows.append(Row("cpu", "float32", work, {"cpu_flash": flash, "matmul": 1.0}))

    def choose(name: str, **inputs: Any):
        return choose_kernels(name, table=Table(tuple(rows)), **inputs)

    monkeypatch.setattr(plan_module, "choose_kernels", choose)
    q, k = torch.randn(1, S, 4, 16), torch.randn(1, S, 2, 16)
    home = {
        "forward": forward_home(q, k, k, None),
        "backward": backward_home(q, q, k, k, q[..., 0], q[..., 0]),
    }
    for direction in DIRECTIONS:
        program = plan.chosen_program(direction, 0, home[direction], None)
        assert program.kernel.name == ("cpu_flash" if direction == faster else "matmul")
        assert plan.chosen_program(direction, 0, home[direction], None) is program


def test_a_kernel_that_refuses_the_tiles_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = context().plan(ra.masks.causal(S))
    picky = Picky()
    picky.name = "picky"
    kernels = {"picky": picky, "matmul": MatmulKernel()}
    monkeypatch.setattr(plan_module, "kernel_by_name", kernels.__getitem__)
    monkeypatch.setattr(plan_module, "choose_kernels", lambda *_, **__: tuple(kernels.values()))
    home = homes(plan)
    assert plan.chosen_program("forward", 0, home["forward"], None).kernel.name == "matmul"
    monkeypatch.setattr(plan_module, "choose_kernels", lambda *_, **__: (picky,))
    with pytest.raises(UserError, match="not to my taste"):
        plan.chosen_program("backward", 0, home["backward"], None)
