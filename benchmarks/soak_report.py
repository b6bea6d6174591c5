"""Whether a process stays as it is: verdict and plot of what `soak` sampled.

A sample is a process at a moment: resident bytes, open file handles, threads. Processes of one role
(the launcher, or a rank) that follow each other are its lives. Flat means, for every measure:

- within a life, after its warm-up: the growth over the life by the Theil-Sen line (the median of
  the slopes between all pairs of samples, which no single jump moves) is within a tolerance, or
  samples do not grow in order (Kendall's tau below `ORDERED`);
- across lives of a role: likewise for the medians of the lives, and their growth per life.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

MEASURES = ("rss", "files", "threads")
WITHIN = {"rss": 0.01, "files": 0.0, "threads": 0.0}
"""Growth over a life that is allowed, relative to its median."""
SLACK = {"rss": 4 * 2**20, "files": 1.0, "threads": 1.0}
"""Growth over a life, or over all lives of a role, that is always allowed."""
ACROSS = {"rss": 0.01, "files": 0.0, "threads": 0.0}
"""Growth over all lives of a role that is allowed, relative to the median."""
ORDERED = 0.5
FEWEST = 12  # samples of a life after its warm-up, below which it is not judged


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One process at one moment.

    Attributes:
        seconds: since the start. role: "launcher", "rank 0", … pid: of the process.
        rss: resident bytes. files: open handles. threads: how many.
    """

    seconds: float
    role: str
    pid: int
    rss: int
    files: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measure of one life of a role, or across its lives.

    Attributes:
        role, measure: what was judged. life: number of the life from 1; 0 across lives.
        samples: how many were judged. median: of them.
        growth: by the robust line, over the life or over all lives. allowed: growth.
        tau: Kendall's, 1 where samples grow in order.
    """

    role: str
    measure: str
    life: int
    samples: int
    median: float
    growth: float
    allowed: float
    tau: float

    @property
    def flat(self) -> bool:
        """Whether it does not grow."""
        return self.growth <= self.allowed or self.tau < ORDERED

    def __str__(self) -> str:
        where = f"life {self.life}" if self.life else "across lives"
        return (
            f"{self.role} {where}: {self.measure} grows by {self.growth:,.1f} "
            f"(median {self.median:,.0f}, allowed {self.allowed:,.1f}, tau {self.tau:.2f})"
        )


def judge(samples: Iterable[Sample], warm_up_s: float) -> list[Finding]:
    """A finding for every measure of every life, and across the lives of every role.

    Args:
        samples: in any order.
        warm_up_s: the first seconds of a life are left out.
    """
    findings: list[Finding] = []
    ordered = sorted(samples, key=lambda s: (s.role, s.seconds))
    for role, group in groupby(ordered, key=lambda s: s.role):
        kept: list[list[Sample]] = []
        lives: dict[int, list[Sample]] = {}
        for sample in group:
            lives.setdefault(sample.pid, []).append(sample)
        for number, life in enumerate(lives.values(), start=1):
            warm = [s for s in life if s.seconds - life[0].seconds >= warm_up_s]
            if len(warm) >= FEWEST:
                findings += [_within(role, number, measure, warm) for measure in MEASURES]
                kept.append(warm)
        if len(kept) >= 3:
            findings += [_across(role, measure, kept) for measure in MEASURES]
    return findings


def _within(role: str, number: int, measure: str, life: list[Sample]) -> Finding:
    x = np.array([s.seconds for s in life])
    y = np.array([getattr(s, measure) for s in life], dtype=float)
    slope, tau = robust_slope(x, y)
    median = float(np.median(y))
    return Finding(
        role=role, measure=measure, life=number, samples=len(y), median=median,
        growth=slope * float(x[-1] - x[0]), tau=tau,
        allowed=SLACK[measure] + WITHIN[measure] * median,
    )  # fmt: skip


def _across(role: str, measure: str, lives: list[list[Sample]]) -> Finding:
    y = np.array([np.median([getattr(s, measure) for s in life]) for life in lives], dtype=float)
    slope, tau = robust_slope(np.arange(len(y), dtype=float), y)
    median = float(np.median(y))
    return Finding(
        role=role, measure=measure, life=0, samples=len(y), median=median,
        growth=slope * (len(y) - 1), tau=tau,
        allowed=SLACK[measure] + ACROSS[measure] * median,
    )  # fmt: skip


def robust_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Theil-Sen slope (median over all pairs) and Kendall's tau of y over ascending x."""
    first, second = np.triu_indices(len(x), 1)
    run, rise = x[second] - x[first], y[second] - y[first]
    return float(np.median(rise / run)), float(np.sign(rise).mean())


def draw(samples: Iterable[Sample], kills: Iterable[float], path: Path, title: str) -> None:
    """A PNG with a panel per measure, a line per process, kills as vertical lines."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ordered = sorted(samples, key=lambda s: (s.role, s.pid, s.seconds))
    roles = sorted({s.role for s in ordered})
    colours = {role: f"C{index}" for index, role in enumerate(roles)}
    units: dict[str, tuple[str, float]] = {
        "rss": ("resident MiB", 2**20), "files": ("open file handles", 1), "threads": ("threads", 1)
    }  # fmt: skip
    figure, axes = plt.subplots(len(MEASURES), 1, figsize=(9, 7), sharex=True, layout="constrained")
    for axis, measure in zip(axes, MEASURES, strict=True):
        label, unit = units[measure]
        named: set[str] = set()
        for (role, _), group in groupby(ordered, key=lambda s: (s.role, s.pid)):
            life = list(group)
            axis.plot(
                [s.seconds / 60 for s in life], [getattr(s, measure) / unit for s in life],
                color=colours[role], lw=1.2, label=None if role in named else role,
            )  # fmt: skip
            named.add(role)
        for kill in kills:
            axis.axvline(kill / 60, color="0.6", lw=0.8, ls=":")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, ncol=len(roles), fontsize=8)
    axes[0].set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("minutes (dotted: SIGKILL of a rank)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def as_rows(samples: Iterable[Sample]) -> list[list[Any]]:
    """Samples as short rows for JSON: seconds, role, pid, rss, files, threads."""
    return [[round(s.seconds, 1), s.role, s.pid, s.rss, s.files, s.threads] for s in samples]
