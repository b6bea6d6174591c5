"""The verdict of the soak: what grows is found; noise, warm-up and jumps are not taken for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringattn.benchmarks import soak
from ringattn.benchmarks.soak_report import Finding, Sample, as_rows, draw, judge, robust_slope

LIFE_S, LIVES, EVERY_S, WARM_UP_S = 300, 4, 2, 60
MIB = 2**20


def _samples(change: Callable[[str, int, float], dict[str, float]], seed: int = 0) -> list[Sample]:
    """Twenty minutes of a launcher and two ranks with three kills; `change` is added to a sample
    from its role, number of life and age in seconds."""
    rng, samples = np.random.default_rng(seed), []
    for life in range(LIVES):
        for age in range(0, LIFE_S, EVERY_S):
            for role in ("launcher", "rank 0", "rank 1"):
                old = age + (life * LIFE_S if role == "launcher" else 0)
                more = change(role, life, old)
                warm = 1 - np.exp(-old / 15)
                rss = 300 * MIB + 100 * MIB * warm + rng.normal(0, MIB) + more.get("rss", 0)
                samples.append(
                    Sample(
                        seconds=life * LIFE_S + age,
                        role=role,
                        pid=1 if role == "launcher" else 10 * life + int(role[-1]) + 2,
                        rss=int(rss),
                        files=int(20 + (rng.random() < 0.1) + more.get("files", 0)),
                        threads=int(12 + (rng.random() < 0.1) + more.get("threads", 0)),
                    )
                )
    return samples


def _growing(samples: list[Sample]) -> list[Finding]:
    return [finding for finding in judge(samples, WARM_UP_S) if not finding.flat]


@pytest.mark.parametrize("number", range(3))
def test_noise_and_warm_up_are_flat(number: int) -> None:
    findings = judge(_samples(lambda *_: {}, number), WARM_UP_S)
    assert not [str(f) for f in findings if not f.flat]
    assert {(f.role, f.measure) for f in findings} == {
        (role, measure)
        for role in ("launcher", "rank 0", "rank 1")
        for measure in ("rss", "files", "threads")
    }
    assert {f.life for f in findings if f.role == "rank 0"} == {0, 1, 2, 3, 4}


def test_a_jump_is_flat() -> None:
    """One that is taken back: an evaluation's buffer, say."""
    jump = {"rss": 200 * MIB, "files": 3.0}
    found = _growing(_samples(lambda _role, _life, age: jump if 150 < age < 190 else {}))
    assert not [str(f) for f in found]


@pytest.mark.parametrize(
    ("measure", "per_minute"), [("rss", 4 * MIB), ("files", 1.0), ("threads", 1.0)]
)
def test_a_leak_within_a_life_is_found(measure: str, per_minute: float) -> None:
    def leak(role: str, _life: int, age: float) -> dict[str, float]:
        return {measure: per_minute * age / 60} if role == "rank 1" else {}

    found = _growing(_samples(leak))
    assert {(f.role, f.measure) for f in found} == {("rank 1", measure)}
    assert {f.life for f in found} >= {1, 2, 3, 4}


@pytest.mark.parametrize(("measure", "each"), [("rss", 8 * MIB), ("files", 2.0), ("threads", 1.0)])
def test_what_every_restart_leaves_behind_is_found(measure: str, each: float) -> None:
    """In the launcher within its one life; in a rank across lives."""

    def leak(role: str, life: int, _age: float) -> dict[str, float]:
        return {} if role == "rank 1" else {measure: each * life}

    found = {(f.role, f.measure, f.life) for f in _growing(_samples(leak))}
    assert found == {("launcher", measure, 1), ("rank 0", measure, 0)}


def test_a_short_life_is_not_judged() -> None:
    short = [s for s in _samples(lambda *_: {}) if s.seconds < WARM_UP_S + 10]
    assert judge(short, WARM_UP_S) == []


def test_the_slope_is_the_median_of_all_pairs() -> None:
    x = np.arange(9.0)
    slope, tau = robust_slope(x, np.where(x == 4, 1000.0, 2 * x))
    assert slope == 2.0
    assert 0.5 < tau < 1
    assert robust_slope(x, np.full(9, 3.0)) == (0.0, 0.0)


def test_results_are_written(tmp_path: Path) -> None:
    samples = _samples(lambda *_: {})
    seen = soak.Soak(samples=samples, disk=[(0.0, 10, 10)], kills=[300.0], failures=["it ended"])
    findings = judge(samples, WARM_UP_S)
    soak.write_results(seen, findings, tmp_path, {"minutes": 20.0, "steps": 5})
    records = (tmp_path / "soak.jsonl").read_text().splitlines()
    assert len(records) == len(findings) + 1
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert len(as_rows(samples)) == len(samples)
    draw(samples[:1], [], tmp_path / "one.png", "one sample")


def test_broken_files_of_a_run_are_failures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    seen = soak.Soak()
    soak.check_run(seen, tmp_path)
    assert any("metrics.jsonl" in failure for failure in seen.failures)
    assert any("eval.jsonl" in failure for failure in seen.failures)
