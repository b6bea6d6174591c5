"""Nodes, domains and cores as they are found, and what plans make of ranks per node."""

from pathlib import Path

import numpy as np
import pytest

import ringattn as ra
from ringattn.launch.config_load import config_from_values
from ringattn.launch.job import build_context, build_degree
from ringattn.launch.model_config import model_config
from ringattn.parallel import topology
from ringattn.parallel.cores import (
    NumaNode,
    format_cpus,
    parse_cpus,
    read_numa_nodes,
    share_of_cores,
)
from ringattn.parallel.host import describe_host, nvlink_sets
from ringattn.parallel.network import fabric_ports, interface_towards
from ringattn.parallel.topology import Topology, even_nodes
from ringattn.schedule import Channel, Schedule


@pytest.mark.parametrize(
    "nodes, size, expected",
    [
        ((4, 4), 8, 4),
        ((8,), 4, 4),
        ((2, 2, 2, 2), 4, 2),
        ((3, 1), 4, 1),
        ((2, 4, 2), 8, 2),
        ((4, 4, 4), 6, 2),  # the second group begins inside a node
        ((4, 2, 2), 4, 2),  # all groups plan alike, though one lies in one node
        ((4, 4), 1, 1),
    ],
)
def test_ranks_per_node_of_groups(nodes: tuple[int, ...], size: int, expected: int) -> None:
    found = Topology(nodes)
    assert found.ranks_per_node(size) == expected
    # By definition every run of so many ranks lies in one node.
    owner = np.repeat(np.arange(len(nodes)), nodes)
    runs = owner.reshape(-1, expected)
    assert (runs == runs[:, :1]).all()


def test_domains_count_before_nodes() -> None:
    assert Topology((8, 8), domains=(4, 4, 4, 4)).ranks_per_node(16) == 4
    assert even_nodes(10, 4) == Topology((4, 4, 2))
    assert even_nodes(2, 8) == Topology((2,))


def test_the_launchers_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, world, expected in [("4", 8, 4), ("8", 4, 4), ("4", 6, 2), ("", 6, 6), ("0", 6, 6)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert topology.ranks_per_node(world) == expected


SHAPE = model_config("debug", vocab_size=256, heads=8, kv_heads=4)
BETWEEN_HEAD_GROUPS = (int(Channel.K), int(Channel.DKV))  # what the plan inside moves


def _plan(method: str, u: int | None = None, per_node: int | None = 2) -> ra.Plan:
    config = config_from_values(
        {
            "parallel.cp": 4,
            "parallel.ranks_per_node": per_node,
            "attention.method": method,
            "attention.layout": "contiguous",
            "attention.u": u,
        }
    )
    return build_context(config, SHAPE, 4).plan(ra.masks.causal(256))


def _head_moves_between_nodes(plan: ra.Plan) -> int:
    """Moves over the network of queries and results, which only ranks that share heads exchange."""

    def count(schedule: Schedule) -> int:
        moves = schedule.moves
        far = moves["src"] // 2 != moves["dst"] // 2
        return int((far & ~np.isin(moves["channel"], BETWEEN_HEAD_GROUPS)).sum())

    return count(plan.forward) + count(plan.backward)


@pytest.mark.parametrize(
    "method, u", [("usp", None), ("loongtrain", None), ("hybrid", None), ("ulysses", 2)]
)
def test_heads_stay_inside_nodes(method: str, u: int | None) -> None:
    plan = _plan(method, u)
    inside = plan.forward.moves["src"] // 2 == plan.forward.moves["dst"] // 2
    assert (inside & (plan.forward.moves["channel"] == int(Channel.Q))).any()
    assert _head_moves_between_nodes(plan) == 0


def test_heads_that_leave_their_node_are_seen() -> None:
    assert _head_moves_between_nodes(_plan("ulysses", 4)) > 0
    assert _head_moves_between_nodes(_plan("usp", per_node=4)) > 0


def test_the_planner_knows_ranks_per_node() -> None:
    values = {"parallel.cp": 4, "parallel.dp": 2, "attention.cluster": "h100_sxm"}
    assert build_context(config_from_values(values), SHAPE, 4).ranks_per_node == 4
    config = config_from_values(values | {"parallel.ranks_per_node": 2})
    context = build_context(config, SHAPE, 4)
    assert context.ranks_per_node == 2
    assert all(
        quote.candidate.u <= 2 or quote.candidate.method == "ulysses"
        for quote in context.compare(ra.masks.causal(1024)).quotes
    )
    assert build_degree(config, SHAPE, 2).ranks_per_node == 2
    assert build_degree(config, SHAPE, 1).ranks_per_node == 1
    # What ranks found counts where the configuration says nothing, and not where it does.
    found = Topology((1,) * 8)
    config_null = config_from_values(values)
    assert build_context(config_null, SHAPE, 4, topology=found).ranks_per_node == 1
    assert build_context(config, SHAPE, 4, topology=found).ranks_per_node == 2


def test_cpu_lists() -> None:
    assert parse_cpus("0-2,5,8-9\n") == {0, 1, 2, 5, 8, 9}
    assert parse_cpus("") == parse_cpus("(none)") == frozenset()
    for text in ("0", "0-2,5,8-9", ""):
        assert format_cpus(parse_cpus(text)) == text


def test_numa_nodes_and_cores(tmp_path: Path) -> None:
    """Two nodes of two cores with two threads each, numbered as on many servers."""
    files = {"cpu/online": "0-7", "node/node0/cpulist": "0-1,4-5", "node/node1/cpulist": "2-3,6-7"}
    files |= {
        f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}"
        for cpu in range(8)
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    nodes = read_numa_nodes(tmp_path)
    assert nodes == (
        NumaNode(0, (frozenset({0, 4}), frozenset({1, 5}))),
        NumaNode(1, (frozenset({2, 6}), frozenset({3, 7}))),
    )
    assert share_of_cores(nodes, 1, 2) == {2, 3, 6, 7}
    assert share_of_cores(nodes, 0, 3) == frozenset()  # less than two cores each
    assert share_of_cores(nodes, 0, 3, numa=1) == {2, 3, 6, 7}
    assert share_of_cores(nodes, 0, 1, numa=5) == frozenset()
    assert read_numa_nodes(tmp_path / "none") == ()


def test_infiniband(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (tmp_path / "mlx5_0" / "device").mkdir()
    (tmp_path / "mlx5_0" / "device" / "numa_node").write_text("1\n")
    (found,) = fabric_ports(tmp_path)
    assert (found.device, found.port, found.active) == ("mlx5_0", 1, True)
    assert (found.rate_gbits, found.numa) == (400.0, 1)


def test_nvlink_sets() -> None:
    """GPUs that links join through other GPUs are one set."""
    links = {("a", "c"), ("c", "e")}
    found = nvlink_sets(list("abcde"), lambda x, y: (x, y) in links or (y, x) in links)
    assert found == ((0, 2, 4), (1,), (3,))
    assert nvlink_sets([], None) == ()


def test_this_host() -> None:
    host = describe_host()
    assert host == describe_host()
    assert host.cpus
    assert host.nvlink_domain >= min(len(host.gpus), 1)
    names = [one.name for one in host.interfaces]
    assert len(set(names)) == len(names)
    loopback = interface_towards("127.0.0.1", host.interfaces)
    assert loopback is not None
    assert loopback.loopback
    assert loopback.up
