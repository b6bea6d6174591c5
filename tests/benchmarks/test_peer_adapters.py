"""Adapters of peers over stand-ins of their packages: layout in and out, masks, gradients."""

import functools
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.benchmarks.blocked_reference import blocked_reference
from ringattn.benchmarks.peer_measure import relative_errors
from ringattn.benchmarks.peer_ranks import Checked, assemble
from ringattn.benchmarks.peers import OURS, YARDSTICK, contenders
from ringattn.benchmarks.peers.attention_slices import attention_slices, slices_refusal
from ringattn.benchmarks.peers.base import Contender, Shape
from ringattn.benchmarks.peers.cases import MaskCase, allowed_block, case_of_mask
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.magi_attention import MagiAttention
from ringattn.benchmarks.peers.ring_flash_attention import RingFlashAttention
from ringattn.benchmarks.peers.torch_context_parallel import BLOCK, TorchContextParallel
from ringattn.benchmarks.peers.transformer_engine import TransformerEngine
from ringattn.benchmarks.peers.usp import USP, heads_degree
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing
from ringattn.masks import Mask
from tests.benchmarks.stand_ins.modules import stand_ins
from tests.ranks import run_ranks

S = 96
SHAPE = Shape(4, 2, 8)
LENGTHS = (41, 7, 30, 18)
MASKS: dict[str, Mask] = {
    "full": ra.masks.full(S),
    "causal": ra.masks.causal(S),
    "window": ra.masks.sliding_window(S, 20, 0),
    "two_sided_window": ra.masks.sliding_window(S, 9, 30),
    "documents": ra.masks.documents(LENGTHS, causal=True),
    "two_sided_documents": ra.masks.documents(LENGTHS, causal=False),
    "shared_question": ra.masks.shared_question(LENGTHS),
    "global_sliding": ra.masks.global_sliding(S, 11),
    "prefix_lm": ra.masks.prefix_lm(S, 29),
    "streaming": ra.masks.streaming(S, 3, 17),
    "dual_scope": ra.masks.dual_scope(S, 16, 5, 7),
    "strided": ra.masks.neighborhood((S,), 5, dilation=3),
    "blocks": ra.masks.blocks(np.eye(6, dtype=bool)[[0, 1, 2, 3, 1, 5]], 16, 16),
    "per_head": ra.masks.per_head([(1, ra.masks.causal(S)), (3, ra.masks.streaming(S, 4, 9))]),
}
PLAIN = {"full", "causal"}
PACKED = {"documents", "two_sided_documents"}
WINDOWS = {"window", "two_sided_window"}
ABLE: list[tuple[Contender, int, set[str]]] = [
    (ZigzagRing(), 2, set(MASKS)),
    (RingFlashAttention(), 2, PLAIN | PACKED | {"window"}),
    (USP(), 2, PLAIN | WINDOWS),
    (USP(), 4, PLAIN),
    (MagiAttention(), 2, set(MASKS) - {"strided", "per_head"}),
    (TransformerEngine("p2p"), 2, PLAIN | PACKED),
    (TransformerEngine("a2a"), 2, PLAIN | PACKED | WINDOWS),
    (TransformerEngine("a2a"), 4, set()),
    (TransformerEngine("all_gather"), 4, PLAIN | PACKED | WINDOWS),
]


def _case(name: str) -> MaskCase:
    return case_of_mask(MASKS[name], name)


@functools.cache
def _reference(name: str) -> Any:
    return blocked_reference(SHAPE.inputs(S), MASKS[name])


def _run(
    rank: int, world: int, group: dist.ProcessGroup, contender: Contender
) -> dict[str, str | Checked]:
    """Results, or why not, of every mask."""
    del group
    answers: dict[str, str | Checked] = {}
    with stand_ins():
        assert contender.installed()
        for name in MASKS:
            reason = contender.refusal(_case(name), SHAPE, world)
            if reason:
                answers[name] = reason
                continue
            made = contender.prepare(_case(name), SHAPE, rank, world)
            results = tuple(x.numpy() for x in made.run())
            assert made.forward is not None
            out, backward = made.forward()
            again = (out, *backward())
            assert all(np.array_equal(a, b.numpy()) for a, b in zip(results, again, strict=True))
            answers[name] = Checked(made.positions, results, made.note, None)
    return answers


@pytest.mark.parametrize(
    "contender, world, able", ABLE, ids=[f"{c.name}-{world}" for c, world, _ in ABLE]
)
def test_an_adapter_hands_a_peer_what_it_asks_for(
    contender: Contender, world: int, able: set[str]
) -> None:
    ranks = run_ranks(world, _run, contender)
    for name in MASKS:
        parts = [answers[name] for answers in ranks]
        if name not in able:
            assert all(isinstance(part, str) and "\n" not in part for part in parts), name
            continue
        checked = [part for part in parts if isinstance(part, Checked)]
        assert len(checked) == world, (name, parts)
        errors = relative_errors(assemble(checked, S), _reference(name))
        assert max(errors.values()) < 2e-6, (name, errors)


def test_deepspeed_and_one_process_take_every_mask() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for name in MASKS:
        assert DeepSpeedUlysses().refusal(_case(name), SHAPE, 2) is None
        made = YARDSTICK.prepare(_case(name), SHAPE, 0, 1)
        results = [x.detach() for x in made.run()]
        assert max(relative_errors(results, _reference(name)).values()) < 2e-6, name


def _ulysses(rank: int, world: int, group: dist.ProcessGroup) -> Checked:
    del group
    made = DeepSpeedUlysses().prepare(_case("per_head"), SHAPE, rank, world)
    return Checked(made.positions, tuple(x.numpy() for x in made.run()), made.note, None)


def test_deepspeed_masks_the_heads_that_a_rank_holds() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    parts = run_ranks(2, _ulysses)
    errors = relative_errors(assemble(parts, S), _reference("per_head"))
    assert max(errors.values()) < 2e-6, errors


def test_what_is_missing_is_refused_with_the_way_to_install_it() -> None:
    for contender in contenders():
        if contender.installed() is None:
            reason = contender.refusal(_case("causal"), SHAPE, 2) or ""
            assert f"{contender.package} is not installed: " in reason
    names = [contender.name for contender in (OURS, *contenders(), YARDSTICK)]
    assert len(set(names)) == len(names) >= 14


def test_what_a_kernel_cannot_is_refused_with_what_it_says() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("only fp16 and bf16\nmore")

    with stand_ins(), pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("flash_attn.flash_attn_func", fail)
        for contender in (RingFlashAttention(), USP()):
            reason = contender.refusal(_case("causal"), SHAPE, 2)
            assert reason == "flash_attn on cpu in torch.float32: RuntimeError: only fp16 and bf16"


def test_heads_are_shared_by_as_many_ranks_as_divide_them() -> None:
    assert heads_degree(Shape(8, 4, 8), 8) == 4
    assert heads_degree(Shape(6, 3, 8), 4) == 1


@pytest.mark.parametrize("name", [n for n in MASKS if slices_refusal(MASKS[n]) is None])
def test_slices_are_the_mask(name: str) -> None:
    i, j = np.arange(S)[:, None], np.arange(S)[None]
    count = np.zeros((S, S), dtype=int)
    for a, b, c, d, kind in attention_slices(MASKS[name]):
        assert 0 <= a < b <= S
        assert 0 <= c < d <= S
        inside = (a <= i) & (i < b) & (c <= j) & (j < d)
        inside &= (j - i <= d - b) | (kind in ("full", "inv_causal"))
        count += inside & ((j - i >= c - a) | (kind in ("full", "causal")))
    np.testing.assert_array_equal(count, MASKS[name].dense())


@pytest.mark.parametrize(
    "mask, pattern, lengths, window",
    [
        (MASKS["full"], "full", (), None),
        (ra.masks.documents([S], causal=True), "causal", (), None),
        (MASKS["two_sided_window"], "window", (), (10, 30)),
        (ra.masks.streaming(S, 0 + 1, S), "causal", (), None),
        (MASKS["documents"], "documents", LENGTHS, None),
        (ra.masks.block_causal_documents(LENGTHS, S), "bidirectional_documents", LENGTHS, None),
        (ra.masks.prefix_tree(LENGTHS, [-1] * 4), "documents", LENGTHS, None),
        (MASKS["streaming"], "other", (), None),
        (MASKS["strided"], "other", (), None),
        (MASKS["per_head"], "other", (), None),
        (MASKS["blocks"], "other", (), None),
    ],
)
def test_the_pattern_of_a_mask_is_read_off_its_bands(
    mask: Mask, pattern: str, lengths: tuple[int, ...], window: tuple[int, int] | None
) -> None:
    case = case_of_mask(mask, "mine")
    assert (case.name, case.pattern, case.lengths, case.seq_len) == ("mine", pattern, lengths, S)
    assert case.mask() is mask
    dense = mask.dense()
    assert case.causal == (not np.triu(dense, 1).any())
    if window:
        assert (case.window, case.ahead) == window
    np.testing.assert_array_equal(
        allowed_block(mask, range(5, 60), range(S), 4), dense[..., 5:60, :]
    )


def test_blocks_selected_at_run_time_are_no_mask_for_peers() -> None:
    case = case_of_mask(ra.masks.routed(ra.masks.causal(S), block_k=16, top_k=2))
    assert "run time" in (case.unfit or "")
    for contender in (ZigzagRing(), YARDSTICK, TorchContextParallel("flex")):
        assert contender.refusal(case, SHAPE, 1) == case.unfit


def _forward(rank: int, world: int, group: dist.ProcessGroup) -> list[Checked]:
    """Forward passes alone: FlexAttention has no backward on a CPU."""
    del group
    from torch.distributed.tensor.experimental._context_parallel import _attention
    from torch.nn.attention import flex_attention

    # Compiling it takes a minute. The inputs want gradients, which the op refuses to make here.
    _attention._compiled_create_block_mask = flex_attention.create_block_mask
    with patch.object(flex_attention, "_validate_device", lambda *_: None):
        return _forwards(rank, world)


def _forwards(rank: int, world: int) -> list[Checked]:
    found = []
    for mask in FLEX:
        made = TorchContextParallel("flex").prepare(case_of_mask(mask), SHAPE, rank, world)
        assert made.forward is not None
        with torch.no_grad():
            out = made.forward()[0].contiguous().numpy()
        found.append(Checked(made.positions, (out,), made.note, None))
    return found


LONG = 4 * BLOCK
FLEX = [
    ra.masks.causal(LONG),
    ra.masks.sliding_window(LONG, 100, 30),
    ra.masks.documents([300, 12, 200], causal=True),
    ra.masks.prefix_lm(LONG, 99),
    ra.masks.per_head([(1, ra.masks.causal(LONG)), (3, ra.masks.streaming(LONG, 4, 9))]),
]


def test_flex_attention_under_context_parallel_attends_as_the_mask_says() -> None:
    ranks = run_ranks(2, _forward)
    for index, mask in enumerate(FLEX):
        (out,) = assemble([found[index] for found in ranks], LONG)
        want = blocked_reference(SHAPE.inputs(LONG), mask)[0]
        assert float((out.double() - want).norm() / want.norm()) < 2e-6, mask.name


def test_torch_context_parallel_says_what_it_lacks_on_a_cpu() -> None:
    shape, long = SHAPE, case_of_mask(ra.masks.causal(LONG))
    sdpa, flex = TorchContextParallel("sdpa"), TorchContextParallel("flex")
    assert "flash_attention_for_cpu" in (sdpa.refusal(long, shape, 2) or "")
    assert "no mask like" in (sdpa.refusal(case_of_mask(MASKS["streaming"]), shape, 2) or "")
    assert "backward" in (flex.refusal(long, shape, 2) or "")
    assert "blocks of 128" in (flex.refusal(_case("causal"), shape, 2) or "")
