"""What ``ringattn doctor`` is made of: rounds of pairs, merged answers, cluster files."""

import datetime

import pytest
import torch

from ringattn.cost import load_cluster, parse_cluster
from ringattn.launch import doctor_host
from ringattn.launch.doctor_cluster import Measured, base_cluster, cluster_text
from ringattn.launch.doctor_links import PairResult, Round, link_rounds, merge_round
from ringattn.launch.doctor_methods import CellResult, cells_for, merge_cell
from ringattn.launch.doctor_rates import Work, name_slow
from ringattn.schedule import Lane

# --- who meets whom ---


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("node", [1, 2, 3, 4, 8])
def test_every_pair_meets_once_on_its_lane(world: int, node: int) -> None:
    node = min(node, world)
    rounds = link_rounds(world, node)
    met = []
    for found in rounds:
        ranks = [rank for pair in found.pairs for rank in pair]
        assert len(set(ranks)) == len(ranks), f"a rank stands in two pairs of {found}"
        for a, b in found.pairs:
            assert (found.lane == Lane.INTRA) == (a // node == b // node)
            met.append((min(a, b), max(a, b)))
    assert sorted(met) == [(a, b) for a in range(world) for b in range(a + 1, world)]


def test_a_large_world_meets_its_neighbours_in_few_rounds() -> None:
    rounds = link_rounds(512, 8)
    assert len(rounds) < 100
    met = {(min(p), max(p)) for found in rounds for p in found.pairs}
    assert all(len({r for p in f.pairs for r in p}) == 2 * len(f.pairs) for f in rounds)
    for distance in (1, 2, 8, 16, 64, 256):
        assert (0, distance) in met
    assert {rank for pair in met for rank in pair} == set(range(512))


# --- what answers are made of ---


def test_answers_of_a_pair_are_the_worse_of_both() -> None:
    found = Round(Lane.INTER, ((0, 2),))
    answers = [
        {"latency_us": 5.0, "gbs": 3.0, "wrong": ""},
        {},
        {"latency_us": 7.0, "gbs": 2.0, "wrong": ""},
    ]
    (pair,) = merge_round(found, answers)
    assert pair == PairResult(lane="inter", ranks=(0, 2), latency_us=7.0, gbs=2.0)


def test_the_cause_of_a_failure_comes_before_those_who_waited() -> None:
    late = CellResult(status="failed", message="timed out", rank=0, silent=True)
    cause = CellResult(status="failed", message="out of memory", rank=3)
    good = CellResult(status="ok", rank=1)
    assert merge_cell([late, good, cause]) is cause
    refusal = CellResult(status="refused", message="odd", rank=1)
    assert merge_cell([refusal, refusal]).status == "refused"
    assert merge_cell([good, refusal]).status == "failed", "ranks must refuse alike"


def test_slow_ranks_are_named() -> None:
    rates = [{"memory_gbs": 10.0}, {"memory_gbs": 7.9}, {"memory_gbs": 9.9}, {"memory_gbs": 10.1}]
    (line,) = name_slow(rates, ["a", "b", "c", "d"])
    assert line.startswith("rank 1 (host b): memory_gbs 7.9")


def test_methods_that_look_at_nodes_see_two() -> None:
    cells = cells_for(["causal"], 4, 4)
    assert cells["double_ring"][0].node == 2
    assert cells["ring"][0].node == 4
    assert cells_for(["causal"], 8, 4)["usp"][0].node == 4


def test_what_may_differ_between_ranks_is_no_finding() -> None:
    first = _gpu_measured("NVIDIA H200").facts[0]
    less = {**first, "device": {**first["device"], "memory_gib": 139.5}}
    assert doctor_host.compare_ranks([first, less]) == []
    other = {**first, "device": {**first["device"], "name": "NVIDIA H100"}}
    (line,) = doctor_host.compare_ranks([first, other])
    assert line == "rank 1 (host a): name NVIDIA H100, rank 0 has NVIDIA H200"
    small = {**first, "host": {**first["host"], "ranks": 4}}
    assert doctor_host.uneven_hosts([first, first]) == []
    assert doctor_host.uneven_hosts([first, small]) == [
        "hosts hold different numbers of ranks: 4, 8"
    ]


def _gpu_measured(name: str) -> Measured:
    fact = {
        "host": {"name": "a", "ranks": 8, "cores": 96, "memory_gib": 1600.0},
        "versions": {},
        "device": {"type": "cuda", "name": name, "memory_gib": 139.8, "cores": 132},
    }
    rates = {
        "gemm_bf16_tflops": 700.0, "forward_tflops": 500.0, "backward_tflops": 400.0,
        "forward_seconds": 0.002, "backward_seconds": 0.005, "kernel": "cudnn",
        "memory_gbs": 3800.0, "to_device_gbs": 54.0, "to_host_gbs": 50.0,
    }  # fmt: skip
    links = {
        "intra": {"gbs": 150.0, "latency_us": 20.0},
        "inter": {"gbs": 24.0, "latency_us": 30.0},
    }
    work = Work(
        gemm={}, tokens=4096, heads=(16, 4), head_dim=128, dtype=torch.bfloat16,
        copy=1, host_copy=1, budget=0.0,
    )  # fmt: skip
    return Measured(facts=[fact] * 16, node=8, links=links, rates=[rates] * 16, work=work)


def test_a_known_gpu_takes_its_data_sheet() -> None:
    text = cluster_text(_gpu_measured("NVIDIA H200"), datetime.date(2026, 1, 2))
    cluster, base = parse_cluster(text, "measured"), load_cluster("h200_sxm")
    assert text.startswith("# Written by ringattn doctor on 2026-01-02.")
    assert cluster.peak_tflops == base.peak_tflops
    assert cluster.gemm_share == pytest.approx(700 / 989, rel=0.01)
    assert (cluster.intra.gbs, cluster.inter.gbs) == (150.0, 24.0)
    assert (cluster.host_gbs, cluster.memory_gib, cluster.host_gib) == (50.0, 140.0, 200.0)
    assert set(cluster.kernels) == {"cudnn"}
    assert cluster.overlap_tax == base.overlap_tax


def test_shared_nics_carry_what_their_ranks_carried_together() -> None:
    measured = _gpu_measured("NVIDIA A800-SXM4-80GB")
    assert base_cluster(measured.facts[0]["device"]) == "a800_sxm"
    cluster = parse_cluster(cluster_text(measured, datetime.date(2026, 1, 2)), "measured")
    assert cluster.inter.gbs == 2 * 24.0, "8 ranks shared 4 NICs"


def test_an_unknown_gpu_has_no_data_sheet() -> None:
    cluster = parse_cluster(
        cluster_text(_gpu_measured("Some GPU"), datetime.date(2026, 1, 2)), "measured"
    )
    assert cluster.peak_tflops == pytest.approx(1000.0)
