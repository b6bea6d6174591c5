"""The grid runner: it resumes, repeats failures, notices changed sources and tells the truth."""

import itertools
import json
from pathlib import Path

import pytest

from ringattn.errors import UserError
from tests.grid import Case, case_id, run_grid, source_digest

CASES: list[Case] = [
    {"mask": mask, "layout": layout}
    for mask, layout in itertools.product(["full", "causal"], ["zigzag", "striped"])
]


class Checker:
    """Counts its calls and gives every case the same error, except for the cases named."""

    def __init__(self, error: float = 1e-14, refuse: str = "", fail: str = "") -> None:
        self.error, self.refuse, self.fail = error, refuse, fail
        self.calls: list[str] = []

    def __call__(self, case: Case) -> dict[str, float]:
        self.calls.append(case_id(case))
        if case["layout"] == self.refuse:
            raise UserError(f"layout={self.refuse}", "is not possible here", "choose another")
        if case_id(case) == self.fail:
            raise RuntimeError("broken kernel")
        return {"out": self.error, "dq": self.error / 2}


def test_a_rerun_skips_what_passed_and_keeps_the_summary(tmp_path: Path) -> None:
    first, second = Checker(), Checker()
    summary = run_grid("g", CASES, first, tolerance=1e-12, results=tmp_path)
    assert summary == run_grid("g", CASES, second, tolerance=1e-12, results=tmp_path)
    assert (len(first.calls), second.calls) == (4, [])
    assert summary["total"] == {
        "ok": 4,
        "refused": 0,
        "failed": 0,
        "max_error": 1e-14,
        "not_run": 0,
    }
    assert summary["by"]["mask"]["causal"]["ok"] == 2


def test_a_note_stands_in_the_summary(tmp_path: Path) -> None:
    summary = run_grid(
        "g", CASES, Checker(), tolerance=1e-12, results=tmp_path, note="Half of the cases."
    )
    assert summary["note"] == "Half of the cases."
    assert "\n## g\n\nHalf of the cases.\n\n" in (tmp_path / "summary.md").read_text()


def test_a_line_torn_by_a_kill_is_run_again(tmp_path: Path) -> None:
    run_grid("g", CASES, Checker(), tolerance=1e-12, results=tmp_path)
    journal = tmp_path / "g.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    checker = Checker()
    run_grid("g", CASES, checker, tolerance=1e-12, results=tmp_path)
    assert checker.calls == [case_id(CASES[-1])]
    run_grid("g", CASES, checker, tolerance=1e-12, results=tmp_path)
    assert len(checker.calls) == 1


def test_failures_are_named_and_repeated(tmp_path: Path) -> None:
    key = case_id(CASES[1])
    with pytest.raises(AssertionError, match=r"g: 1 of 4 cases failed\n.*RuntimeError: broken"):
        run_grid("g", CASES, Checker(fail=key), tolerance=1e-12, results=tmp_path)
    again = Checker()
    assert run_grid("g", CASES, again, tolerance=1e-12, results=tmp_path)["total"]["ok"] == 4
    assert again.calls == [key]


@pytest.mark.parametrize("error", [2e-12, float("nan"), float("inf")])
def test_an_error_above_the_tolerance_fails(tmp_path: Path, error: float) -> None:
    with pytest.raises(AssertionError, match=r"4 of 4 cases failed\n.*out"):
        run_grid("g", CASES, Checker(error), tolerance=1e-12, results=tmp_path)


def test_refusals_are_counted_and_told(tmp_path: Path) -> None:
    run_grid("g", CASES, Checker(refuse="striped"), tolerance=1e-12, results=tmp_path)
    run_grid("h", CASES[:1], Checker(), tolerance=1e-12, results=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["g"]["by"]["layout"]["striped"]["refused"] == 2
    text = (tmp_path / "summary.md").read_text()
    assert "| layout striped | 0 | 2 | 0 |  |" in text
    assert "- layout=striped: is not possible here; choose another" in text
    assert "## h" in text


def test_results_of_other_sources_do_not_count(tmp_path: Path) -> None:
    run_grid("g", CASES, Checker(), tolerance=1e-12, results=tmp_path)
    checker = Checker()
    run_grid("g", CASES, checker, tolerance=1e-12, results=tmp_path, folders=("kernels",))
    assert len(checker.calls) == 4


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "a.py"
    path.write_text("x = 1\n")
    digests = {source_digest(["kernels"], tmp_path)}
    path.write_text("x = 2\n")
    digests.add(source_digest(["kernels"], tmp_path))
    path.rename(path.with_name("b.py"))
    digests.add(source_digest(["kernels"], tmp_path))
    assert len(digests) == 3
