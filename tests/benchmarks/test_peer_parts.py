"""Parts of the comparison on their own: masks, the blocked reference, the wire count, the bars."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.benchmarks.blocked_reference import blocked_reference
from ringattn.benchmarks.measured_report import table
from ringattn.benchmarks.peers.base import Shape
from ringattn.benchmarks.peers.cases import NAMES, allowed_block, mask_case
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing
from ringattn.benchmarks.record import Record
from ringattn.benchmarks.wire import counted_wire
from tests.closeness import assert_close
from tests.ranks import run_ranks

SHAPE = Shape(4, 2, 8)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_a_mask_are_cut_from_the_whole(name: str) -> None:
    case = mask_case(name, 192)
    assert sum(case.lengths) in (0, 192)
    whole = case.mask().dense()
    for queries, keys in ((range(192), range(192)), (range(50, 90), range(17, 131))):
        block = allowed_block(case.mask(), queries, keys)
        np.testing.assert_array_equal(block, whole[np.ix_(queries, keys)])


def test_blocks_of_a_strided_mask_too() -> None:
    mask = ra.masks.dual_scope(96, 16, 5, 7)
    block = allowed_block(mask, range(11, 80), range(3, 96))
    np.testing.assert_array_equal(block, mask.dense()[11:80, 3:])


@pytest.mark.parametrize("name", NAMES)
def test_the_blocked_reference_is_the_dense_one(name: str) -> None:
    mask, inputs = mask_case(name, 160).mask(), SHAPE.inputs(160)
    want = ra.reference(*inputs[:3], mask, inputs[3])
    got = blocked_reference(inputs, mask, rows=37)
    for part, tensor in zip(("out", "dq", "dk", "dv"), got, strict=True):
        assert_close(part, getattr(want, part), tensor, 1e-13)


def _talk(rank: int, world: int, group: dist.ProcessGroup) -> list[int]:
    del group
    x, counts = torch.zeros(world * 6, dtype=torch.float32), []
    right, left = (rank + 1) % world, (rank - 1) % world

    def ring() -> None:
        ops = [dist.P2POp(dist.isend, x, right), dist.P2POp(dist.irecv, torch.empty_like(x), left)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    for talk in (
        ring,
        lambda: dist.all_to_all_single(torch.empty_like(x), x),
        lambda: dist.all_gather([torch.empty_like(x) for _ in range(world)], x),
        lambda: dist.all_reduce(x),
        lambda: None,
    ):
        with counted_wire(rank, world) as wire:
            talk()
        counts.append(wire.sent)
    with counted_wire(rank, world), pytest.raises(RuntimeError, match="broadcast is not counted"):
        dist.broadcast(x, 0)
    return counts


def test_the_wire_count_is_what_leaves_a_rank() -> None:
    size = 3 * 6 * 4
    for counts in run_ranks(3, _talk):
        assert counts == [size, size * 2 // 3, 2 * size, 4 * size // 3, 0]


def test_peers_refuse_what_does_not_divide() -> None:
    case = mask_case("causal", 130)
    assert "130 tokens" in (ZigzagRing().refusal(case, SHAPE, 2) or "")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    assert "130 tokens" in (DeepSpeedUlysses().refusal(case, SHAPE, 4) or "")
    assert "query heads" in (DeepSpeedUlysses().refusal(mask_case("causal", 96), SHAPE, 3) or "")


def _record(mask: str, name: str, sent: int, ratio: float | None) -> Record:
    config = {"mask": mask, "contender": name, "ranks": 2, "sent_bytes": [sent, sent],
              "wall_s": 1.0, "errors": {"out": 1e-7}, "how": ""}  # fmt: skip
    if ratio is not None:
        config |= {"cpu_ratio": ratio, "cpu_ratio_spread": 0.0}
    return Record(name="m", case=mask + name, value=1.0, unit="s", spread=0.0, config=config)


@pytest.mark.parametrize(
    "mask, sent, ratio, bar",
    [
        ("causal", 96, 1.04, "met"),
        ("causal", 94, 1.06, "missed: bytes, CPU"),
        ("window", 101, 0.99, "met"),
        ("window", 99, 0.99, "missed: bytes"),
        ("window", 101, 1.01, "missed: CPU"),
    ],
)
def test_the_bar_allows_five_per_cent_on_causal_only(
    mask: str, sent: int, ratio: float, bar: str
) -> None:
    lines = table([_record(mask, "ringattn", 100, 1.0), _record(mask, "peer", sent, ratio)])
    (line,) = [line for line in lines.splitlines() if "| peer |" in line]
    assert f"| {bar} |" in line
