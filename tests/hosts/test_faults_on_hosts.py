"""A link that is cut, a host that is gone, a rank that hangs: nobody waits for ever."""

import tempfile
from pathlib import Path

import pytest

from tests.grid import run_grid
from tests.hosts.faults import FAULTS, GRACE_S, TIMEOUT_S, inject
from tests.hosts.jobs import STARTUP_S
from tests.launch.training import uneven_corpus

pytestmark = pytest.mark.timeout(2 * STARTUP_S)
SEEDS = 20
SOURCES = ("ringattn", "kernels", "parallel", "launch")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_cut_link_ends_both_sides(corpus: Path, tmp_path: Path, seed: int) -> None:
    print(inject("link cut", 2, seed, corpus, tmp_path))


@pytest.mark.full
@pytest.mark.timeout(6 * 3600)
def test_every_fault_ends_every_rank(corpus: Path, grid_seconds: float | None) -> None:
    """All faults at moments drawn from seeds, on two hosts, and on three for every fourth seed."""
    cases = [
        {"fault": fault, "hosts": 3 if seed % 4 == 3 else 2, "seed": seed}
        for seed in range(SEEDS)
        for fault in FAULTS
    ]

    def check(case: dict) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            outcome = inject(case["fault"], case["hosts"], case["seed"], corpus, Path(folder))
        return {"seconds beyond run.timeout_s": max(0.0, outcome.seconds - TIMEOUT_S)}

    run_grid(
        "failures",
        cases,
        check,
        tolerance=GRACE_S,
        folders=SOURCES,
        axes=("fault", "hosts"),
        seconds=grid_seconds,
        note=(
            "Faults on one of several hosts (network namespaces) at random moments of a training "
            "under torchrun. Every rank that is left must exit with a code other than 0, and a "
            "report must name rank and step. The error is the seconds that the last one needed "
            f"beyond run.timeout_s = {TIMEOUT_S:g}."
        ),
    )
