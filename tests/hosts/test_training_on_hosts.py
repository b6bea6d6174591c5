"""Training across a network is training on one host: the same losses, bit for bit.

The processes are real: torchrun on every host, one rank each, gloo over the hosts' addresses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringattn.launch.metrics import METRICS_FILE, read_lines
from tests.hosts.jobs import STARTUP_S, start_job
from tests.hosts.network import Host, open_network
from tests.launch.training import (
    run_command,
    tiny_values,
    train_pooled,
    uneven_corpus,
    write_config,
)

pytestmark = pytest.mark.timeout(2 * STARTUP_S + 60)
Lines = list[dict[str, Any]]
Shape = Callable[[Host], object]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("corpus"))


def values_of(corpus: Path, run_dir: Path, ranks: int, **overrides: Any) -> dict[str, Any]:
    values = {"train__steps": 8, "train__eval_packs": 1, "train__deterministic": True}
    return tiny_values(corpus, run_dir, parallel__cp=ranks, **(values | overrides))


def train_on_hosts(
    values: dict[str, Any],
    folder: Path,
    ranks: int,
    shape: Shape | None = None,
    *,
    loopback_names: bool = False,
) -> Lines:
    """Trains with one rank on each of as many hosts, the last one behind a link of that shape."""
    config = write_config(folder / "hosts.yaml", values)
    with open_network(ranks, loopback_names=loopback_names) as network:
        if shape:
            shape(network.hosts[-1])
        with start_job(network, config) as job:
            assert job.finish(2 * STARTUP_S) == [0] * ranks, job.text()
    return read_lines(Path(values["run.dir"]) / METRICS_FILE)


def assert_bitwise(expected: Lines, got: Lines) -> None:
    """Floats are written so that they are read back exactly."""
    for key in ("step", "loss", "grad_norm", "tokens"):
        assert [line[key] for line in got] == [line[key] for line in expected], key


def test_two_hosts_train_like_one(corpus: Path, tmp_path: Path) -> None:
    expected = train_pooled(values_of(corpus, tmp_path / "alone", 2))
    got = train_on_hosts(values_of(corpus, tmp_path / "hosts", 2), tmp_path, 2)
    assert_bitwise(expected, got)


def test_another_seed_is_not_bitwise_equal(corpus: Path, tmp_path: Path) -> None:
    """The comparison can fail: one weight that starts otherwise shows."""
    lines = [
        train_pooled(values_of(corpus, tmp_path / str(seed), 2, seed=seed, train__steps=1))
        for seed in (7, 8)
    ]
    with pytest.raises(AssertionError):
        assert_bitwise(*lines)


LINKS: dict[str, Shape | None] = {
    "plain": None,
    "slow": lambda host: host.shape(rate=20e6, delay=0.005),
    "lossy": lambda host: host.shape(delay=0.001, loss=0.01),
}
FULL_CASES = [(2, "plain"), (4, "plain"), (2, "slow"), (2, "lossy"), (4, "lossy")]


@pytest.mark.full
@pytest.mark.timeout(4 * STARTUP_S)
@pytest.mark.parametrize("ranks, link", FULL_CASES)
def test_hosts_train_like_the_command_alone(
    corpus: Path, tmp_path: Path, ranks: int, link: str
) -> None:
    """Against ``ringattn train`` that starts its own ranks, over good links and bad ones."""
    values = values_of(corpus, tmp_path / "alone", ranks)
    config = write_config(tmp_path / "alone.yaml", values)
    code, out, err = run_command("train", str(config))
    assert code == 0, out + err
    values = values_of(corpus, tmp_path / "hosts", ranks)
    got = train_on_hosts(values, tmp_path, ranks, LINKS[link])
    assert_bitwise(read_lines(tmp_path / "alone" / METRICS_FILE), got)


@pytest.mark.full
def test_hosts_whose_own_names_lead_to_the_loopback(corpus: Path, tmp_path: Path) -> None:
    """Gloo would listen on 127.0.1.1 there; the interface towards the others is found."""
    values = values_of(corpus, tmp_path / "run", 2, train__steps=2)
    assert len(train_on_hosts(values, tmp_path, 2, loopback_names=True)) == 2


def refused_on_hosts(corpus: Path, folder: Path, env: dict[str, str], **values: Any) -> str:
    """The one line about a job of two hosts, each with a dead end, that must not start."""
    overrides = {"run__timeout_s": 30.0, **values}
    config = write_config(folder / "c.yaml", values_of(corpus, folder / "run", 2, **overrides))
    with open_network(2) as network:
        for host in network.hosts:
            host.add_dead_end()
        with start_job(network, config, env) as job:
            assert 0 not in job.finish(STARTUP_S), job.text()
            lines = [line for a in job.agents for line in a.err.matching("^ringattn: ")]
            assert len(lines) == 1, job.text()
            assert not any(agent.err.matching("connectFullMesh") for agent in job.agents)
    return lines[0]


@pytest.mark.full
def test_an_interface_that_leads_nowhere_is_named(corpus: Path, tmp_path: Path) -> None:
    line = refused_on_hosts(corpus, tmp_path, {"GLOO_SOCKET_IFNAME": "dead0"})
    for part in ("rank 0", "rank 1", "host0", "host1", "dead0", "10.78.0.", "run.interface"):
        assert part in line, line


@pytest.mark.full
def test_an_interface_that_is_not_there_is_named(corpus: Path, tmp_path: Path) -> None:
    line = refused_on_hosts(corpus, tmp_path, {"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert "nosuch0" in line
    assert "eth0" in line


@pytest.mark.full
@pytest.mark.parametrize("name, says", [("nosuch0", "is no network interface"), ("dead0", "dead0")])
def test_the_interface_of_the_configuration(
    corpus: Path, tmp_path: Path, name: str, says: str
) -> None:
    line = refused_on_hosts(corpus, tmp_path, {}, run__interface=name)
    assert says in line
    assert "run.interface" in line
