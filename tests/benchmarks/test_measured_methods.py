"""The comparison with peers at a tiny size on real ranks: results, bytes, and what it refuses."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ringattn.benchmarks import measured_methods
from ringattn.benchmarks.blocked_reference import blocked_reference
from ringattn.benchmarks.measured_methods import NAME, record
from ringattn.benchmarks.peer_measure import LEAST_ROUNDS, Outcome, Pools, measure
from ringattn.benchmarks.peers import OURS, YARDSTICK, contenders, variants
from ringattn.benchmarks.peers.base import Contender, Prepared, Shape, Tensors
from ringattn.benchmarks.peers.cases import NAMES, MaskCase, mask_case
from ringattn.benchmarks.peers.deepspeed_ulysses import DeepSpeedUlysses
from ringattn.benchmarks.peers.zigzag_ring import ZigzagRing, ring_bytes
from ringattn.benchmarks.peers.zigzag_varlen import padded_rows
from ringattn.benchmarks.record import Recorder, read_records

SEQ_LEN, WORLD = 256, 2
SHAPE = Shape(q_heads=4, kv_heads=2, head_dim=16)
PEERS = (OURS, *contenders(), YARDSTICK, *variants())
RUN_ON_CPU = {p.name for p in (OURS, *contenders()[:3], YARDSTICK, *variants())}
NO_DEEPSPEED = DeepSpeedUlysses().refusal(mask_case("causal", SEQ_LEN), SHAPE, WORLD)


@dataclass(frozen=True)
class WrongRing(ZigzagRing):
    """A ring whose dk is a little wrong on one rank."""

    name: str = "wrong_ring"

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        right = super().prepare(case, shape, rank, world)

        def run() -> Tensors:
            out, dq, dk, dv = right.run()
            return out, dq, dk * (1.001 if rank == 1 else 1.0), dv

        return replace(right, run=run)


@dataclass(frozen=True)
class DyingRing(ZigzagRing):
    """A ring whose rank 1 ends its process in the second run, the first one that is timed."""

    name: str = "dying_ring"

    def prepare(self, case: MaskCase, shape: Shape, rank: int, world: int) -> Prepared:
        right, runs = super().prepare(case, shape, rank, world), []

        def run() -> Tensors:
            runs.append(1)
            if len(runs) == 2 and rank == 1:
                os._exit(3)
            return right.run()

        return replace(right, run=run)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with ExitStack() as stack:
        yield Pools(stack, yardstick_threads=1)


def outcomes(mask: str, rivals: tuple[Contender, ...], pools: Pools) -> dict[str, Outcome]:
    case = mask_case(mask, SEQ_LEN)
    reference = blocked_reference(SHAPE.inputs(SEQ_LEN), case.mask())
    found = measure(case, WORLD, SHAPE, rivals, reference, pools, seconds=0.0)
    return {outcome.contender.name: outcome for outcome in found}


@pytest.mark.parametrize("mask", NAMES)
def test_every_contender_agrees_with_the_reference(mask: str, pools: Pools) -> None:
    case = mask_case(mask, SEQ_LEN)
    for name, outcome in outcomes(mask, PEERS, pools).items():
        if name == "zigzag_varlen" and not case.is_packed:
            assert outcome.status == "refused"
        elif name == "deepspeed_ulysses" and NO_DEEPSPEED:
            assert outcome.status == "refused"
            assert "pip install" in outcome.reason
        elif name not in RUN_ON_CPU:
            assert (outcome.status, outcome.cpu_s) == ("refused", []), f"{name}: {outcome.reason}"
            assert outcome.reason
        else:
            assert outcome.status == "ok", f"{name}: {outcome.reason}"
            assert outcome.errors.keys() == {"out", "dq", "dk", "dv"}
            assert max(outcome.errors.values()) < 2e-6, name
            assert len(outcome.cpu_s) == len(outcome.wall_s) == LEAST_ROUNDS
            assert len(outcome.sent_bytes) == (1 if outcome.contender is YARDSTICK else WORLD)


@pytest.mark.parametrize("mask", ["causal", "window", "short_documents"])
def test_a_plain_ring_sends_what_its_formula_says(mask: str, pools: Pools) -> None:
    case, found = mask_case(mask, SEQ_LEN), outcomes(mask, contenders()[:2], pools)
    heads = SHAPE.kv_heads, SHAPE.head_dim
    plain = ring_bytes(SEQ_LEN // WORLD, WORLD, *heads)
    assert plain == 4 * 2 * SEQ_LEN // 2 * 2 * 16 * 4  # k, v once there and back, dk, dv twice
    assert found["zigzag_ring"].sent_bytes == [plain] * WORLD
    if case.is_packed:
        padded = ring_bytes(padded_rows(case.lengths, WORLD), WORLD, *heads)
        assert found["zigzag_varlen"].sent_bytes == [padded] * WORLD
        assert padded > plain


@pytest.mark.skipif(NO_DEEPSPEED is not None, reason=NO_DEEPSPEED or "")
def test_deepspeed_exchanges_each_tensor_once_each_way(pools: Pools) -> None:
    found = outcomes("documents", (DeepSpeedUlysses(),), pools)["deepspeed_ulysses"]
    heads = 2 * SHAPE.q_heads + 2 * SHAPE.kv_heads  # q, out, k, v
    shard = SEQ_LEN // WORLD * heads * SHAPE.head_dim * 4
    assert found.sent_bytes == [2 * shard * (WORLD - 1) // WORLD] * WORLD


def test_a_wrong_peer_is_reported_and_not_timed(pools: Pools, tmp_path: Path) -> None:
    found = outcomes("documents", (OURS, WrongRing()), pools)
    wrong = found["wrong_ring"]
    assert (wrong.status, wrong.cpu_s) == ("error", [])
    assert re.fullmatch(r"wrong dk: relative error [678]\.\de-04; not timed", wrong.reason)
    recorder = Recorder(tmp_path / "r.jsonl")
    record(recorder, mask_case("documents", SEQ_LEN), WORLD, SHAPE, list(found.values()))
    ours, other = read_records(recorder.path)
    assert (ours.status, other.status, other.value) == ("ok", "error", None)
    assert other.reason == wrong.reason


def test_others_are_timed_when_a_peer_kills_its_ranks(pools: Pools) -> None:
    found = outcomes("causal", (OURS, DyingRing(), ZigzagRing()), pools)
    assert "exit codes" in found["dying_ring"].reason
    assert found["dying_ring"].status == "error"
    for name in ("ringattn", "zigzag_ring"):
        assert (found[name].status, len(found[name].cpu_s)) == ("ok", LEAST_ROUNDS)


def test_the_command_writes_records_table_and_plot_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.jsonl"
    argv = ["x", "--world", "2", "--seq-len", "128", "--head-dim", "16", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", [*argv, "--masks", "short_documents", "--json", str(path)])
    measured_methods.main()
    records = read_records(path)
    assert {r.config["contender"] for r in records} == {
        c.name for c in (OURS, *contenders(), YARDSTICK)
    }
    assert all(r.name == NAME and r.config["mask"] == "short_documents" for r in records)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| short_documents | zigzag_ring |" in path.with_suffix(".md").read_text()
    capsys.readouterr()
    measured_methods.main()
    assert "in the file already" in capsys.readouterr().out
    assert read_records(path) == records
