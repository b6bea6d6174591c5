"""What every test gets: one thread, a seed that is shown, a hard timeout, marks for full and GPU.

Each test is seeded from its own id and ``--seed``, so that it draws the same numbers alone and in
the whole suite; the seed is printed with every failure.
"""

import faulthandler
import os
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

# Before triton is imported: its kernels run in its interpreter. On a machine with a GPU,
# TRITON_INTERPRET=0 lets the tests marked gpu compile them instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.ranks import close_pools, preload, run_ranks

BACKSTOP_GRACE = 60.0  # seconds after the timeout until a test stuck in C code ends the session
_SEED = pytest.StashKey[int]()
_STDERR = pytest.StashKey[int]()

hypothesis.settings.register_profile("ringattn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ringattn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    parser.addoption(
        "--grid-seconds", type=float, help="with --full: each grid starts no case later than this"
    )
    parser.addoption("--seed", type=int, default=0, help="base seed of every test (default 0)")


@pytest.fixture
def grid_seconds(request: pytest.FixtureRequest) -> float | None:
    """Time that a grid may take, from ``--grid-seconds``; None for as long as it takes."""
    return request.config.getoption("--grid-seconds")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[_STDERR] = os.dup(2)  # the terminal, also while pytest captures output


def pytest_report_header(config: pytest.Config) -> str:
    return f"ringattn: torch {torch.__version__}, base seed {config.getoption('--seed')} (--seed)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What every rank would import for these tests, and takes seconds, is imported once."""
    folders = {item.path.parent.name for item in session.items}
    if folders & {"launch", "hf"}:
        for module in ("torch._dynamo", "torch.distributed.fsdp", "ringattn.launch.trainer"):
            preload(module)
    if "hf" in folders:
        preload("transformers.models.llama.modeling_llama")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the session with every thread's stack when the timeout's signal cannot get through."""
    timeout = _timeout_of(item)
    if timeout:
        stderr = item.config.stash[_STDERR]
        faulthandler.dump_traceback_later(timeout + BACKSTOP_GRACE, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed and _SEED in item.stash:
        base = item.config.getoption("--seed")
        report.sections.append(("seed", f"{item.stash[_SEED]} (from the id and --seed={base})"))
    return report


def pytest_sessionfinish() -> None:
    close_pools()


def _timeout_of(item: pytest.Item) -> float:
    """The test's own timeout in seconds, else the session's; 0 for none."""
    mark = item.get_closest_marker("timeout")
    if mark is not None:
        return float(mark.kwargs.get("timeout", mark.args[0] if mark.args else 0))
    option = item.config.getoption("timeout", None)
    return float(option if option is not None else item.config.getini("timeout") or 0)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed; Python's, NumPy's and torch's generators already start from it."""
    base: Any = request.config.getoption("--seed")
    value = (zlib.crc32(request.node.nodeid.encode()) + base) % 2**32
    request.node.stash[_SEED] = value
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts from the test's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def ranks() -> Callable[..., list]:
    """``tests.ranks.run_ranks``: runs a function on real gloo ranks."""
    return run_ranks
