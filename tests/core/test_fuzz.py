"""Attention on random cases; what they are is in `fuzz_cases`, what is checked in `fuzz_check`.

A failure names its seed; ``python -m tests.fuzz --case SEED`` repeats it. `--seed N` draws others.
"""

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from ringattn import UserError
from tests.core import faults
from tests.core.fuzz_cases import draw_case, rules_broken
from tests.core.fuzz_check import check_seed
from tests.core.fuzz_masks import KINDS
from tests.core.fuzz_sound import LAYOUTS, METHODS
from tests.fuzz import MOST_REFUSED, PER_SEED, run_case
from tests.grid import run_grid

BATCHES, CASES = 4, 10  # of the default run: so many tests of so many cases
FULL = 2000
WITHIN = 60  # cases within which a fault must be found
FAULTS = [
    faults.merge_with_the_larger_lse,
    faults.rows_land_one_lower,
    faults.taken_sources_are_not_cleared,
    faults.a_key_move_is_lost,
    faults.a_gradient_stays_away,
    faults.softcap_has_no_slope,
    faults.slices_forget_their_heads,
    faults.lse_is_not_counted,
]


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    """Where the seeds of this run start."""
    return PER_SEED * int(request.config.getoption("--seed") or 0)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_cases(batch: int, first_seed: int) -> None:
    for seed in range(first_seed + CASES * batch, first_seed + CASES * (batch + 1)):
        outcome = run_case(seed)
        assert outcome.status != "failed", f"seed {seed}: {outcome.message}"


def test_the_cases_are_of_all_kinds_and_few_are_refused(first_seed: int) -> None:
    cases = [draw_case(seed) for seed in range(first_seed, first_seed + FULL)]
    values = [case.values for case in cases]
    assert {v["mask"] for v in values} >= set(KINDS)
    assert {v["method"] for v in values} == set(METHODS)
    assert {v["layout"] for v in values} >= set(LAYOUTS)
    assert {v["world"] for v in values} >= {*range(1, 9), 12, 16}
    flags = [case.sinks for case in cases], [case.softcap for case in cases]
    assert all(any(f) and not all(f) for f in flags)
    assert any(case.batch == 0 for case in cases)
    assert any(case.head_dim[0] != case.head_dim[1] for case in cases)
    assert 0.03 < sum(bool(rules_broken(case)) for case in cases) / FULL < MOST_REFUSED / 2


def test_every_rule_is_broken_by_some_case(first_seed: int) -> None:
    broken = Counter(
        rule
        for seed in range(first_seed, first_seed + FULL)
        for rule in rules_broken(draw_case(seed))
    )
    assert len(broken) >= 17, broken


def _found(seeds: range) -> int | None:
    """The first seed that fails."""
    return next((seed for seed in seeds if run_case(seed).status == "failed"), None)


@pytest.mark.parametrize("inject", FAULTS, ids=lambda inject: inject.__name__)
def test_a_fault_is_found(
    inject: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, first_seed: int
) -> None:
    inject(monkeypatch)
    assert _found(range(first_seed, first_seed + WITHIN)) is not None


def test_a_seed_gives_the_same_case_again(first_seed: int) -> None:
    a, b = draw_case(first_seed + 3), draw_case(first_seed + 3)
    assert str(a) == str(b)


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_many_random_cases(first_seed: int, grid_seconds: float | None) -> None:
    torch.set_num_threads(1)

    def check(case: dict) -> dict[str, float]:
        try:
            return check_seed(case["seed"])
        except UserError as error:  # one line in the summary for each rule, whatever the numbers
            what, rule, fix = (
                re.sub(r"-?\d+(\.\d+)?", "N", re.sub(r"\[.*\]", "[…]", part))
                for part in (error.what, error.rule, error.fix)
            )
            raise UserError(what, rule, fix) from error

    summary = run_grid(
        "fuzz",
        [draw_case(seed).values for seed in range(first_seed, first_seed + FULL)],
        check,
        tolerance=1.0,
        axes=("mask", "layout", "method", "world", "heads", "dtype"),
        seconds=grid_seconds,
        note=f"Random cases of the seeds {first_seed} to {first_seed + FULL - 1}. Each plan is "
        "proved on integers and run twice; errors are in parts of those allowed. Refused are "
        "cases drawn to break a rule, each by a rule that it breaks.",
    )
    ran = summary["total"]["ok"] + summary["total"]["refused"]
    assert summary["total"]["refused"] <= MOST_REFUSED * ran
