"""The tests of this folder need network namespaces: without, they are skipped with the reason."""

import pytest

from tests.hosts.namespaces import refusal


@pytest.fixture(scope="session", autouse=True)
def needs_hosts() -> None:
    """Skips where the machine cannot have several hosts."""
    if reason := refusal():
        pytest.skip(reason)
