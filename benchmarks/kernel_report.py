"""Tables, bars and the plot of the kernel benchmark, from its records."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ringattn.benchmarks import kernel_bars as bars
from ringattn.benchmarks.kernel_cases import Case
from ringattn.benchmarks.kernel_masks import NAMES
from ringattn.benchmarks.kernel_measure import DIRECTIONS
from ringattn.benchmarks.kernel_results import BAND, Results, read_results
from ringattn.schedule import Direction

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#17becf", "#bcbd22")
NONE = "–"


def write_report(path: Path) -> None:
    """Writes `path`.md, and `path`.png for each architecture; prints the tables."""
    found = read_results(path)
    if not found:
        print(f"{path}: nothing is measured yet")
        return
    text = "\n".join(report(results) for results in found)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    for results in found:
        if results.kernels:
            name = path.stem if len(found) == 1 else f"{path.stem}_{results.architecture}"
            plot(results, path.with_name(f"{name}.png"))


def report(results: Results) -> str:
    """Markdown: speed, bars, published figures, accuracy and memory, what was not measured."""
    parts = [f"# Kernels on {results.architecture}\n", _place(results)]
    for setting, cases in _settings(results.cases):
        parts += [f"## {setting}\n", _speeds(results, cases)]
    parts += ["## Bars\n", _bars(results)]
    if results.architecture == bars.PUBLISHED_ON:
        parts += ["## Published on one H100, beside ours\n", _published(results)]
    parts += [
        "## Accuracy and memory\n",
        _accuracy(results),
        "## Not measured\n",
        _missing(results),
    ]
    return "\n".join(parts) + "\n"


def _place(results: Results) -> str:
    record = next(iter(results.records.values()))
    device = record.hardware["gpu"] or f"{record.hardware['cpu']}, {record.hardware['cores']} cores"
    threads = record.config.get("threads")
    if threads:
        device += f", {threads} thread{'s' * (threads > 1)}, CPU time"
    return (
        f"{device}, torch {record.versions['torch']}. TFLOP/s by exact area, forward / backward, "
        "medians; `auto` is what the selector takes among the kernels measured.\n"
    )


def _settings(cases: Iterable[Case]) -> list[tuple[str, list[Case]]]:
    """Cases by setting, masks in their usual order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.setting, []).append(case)
    return [(s, sorted(cs, key=lambda c: NAMES.index(c.mask))) for s, cs in groups.items()]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _speeds(results: Results, cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        cells = [
            " / ".join(_number(results.rate(case, d, kernel)) for d in DIRECTIONS)
            for kernel in results.kernels
        ]
        chosen = [results.chosen(case, d) or NONE for d in DIRECTIONS]
        rows.append([case.mask, *cells, " / ".join(dict.fromkeys(chosen))])
    return _table(["mask", *results.kernels, "auto"], rows)


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bars(results: Results) -> str:
    judged = [v for v in bars.verdicts(results) if v.value is not None]
    open_count = len(bars.verdicts(results)) - len(judged)
    rows = [
        [v.what, v.case, v.direction, f"{v.value:.3f}", f"{'≤' if v.at_most else '≥'} {v.bar}",
         "pass" if v.met else "**fail**"]
        for v in judged
    ]  # fmt: skip
    passed = sum(bool(v.met) for v in judged)
    note = f"{passed} of {len(judged)} pass; {open_count} cannot be judged on these results.\n"
    if not rows:
        return note
    header = ["what", "case", "direction", "value", "bar", ""]
    return _table(header, rows) + "\n" + note


def _published(results: Results) -> str:
    rows = []
    for mask, kernel, *published in bars.PUBLISHED:
        case = Case(mask, 32768)
        ours = [
            f"{name} {' / '.join(_number(results.rate(case, d, name)) for d in DIRECTIONS)}"
            for name in results.kernels
        ]
        rows.append([mask, kernel, " / ".join(map(str, published)), ", ".join(ours)])
    return _table(["mask", "published", "TFLOP/s", "here, 32K 64:8 d128"], rows)


def _accuracy(results: Results) -> str:
    """Per kernel: median and worst relative error, worst ratio to the library, most workspace."""
    rows = []
    for kernel in results.kernels:
        for direction, name in _outputs():
            errors, ratios = [], []
            for case in results.cases:
                error = results.errors(case, direction, kernel).get(name)
                if error is not None:
                    errors.append(error)
                    ratios.append(bars.error_ratio(results, case, direction, kernel, name))
            known = [r for r in ratios if r is not None]
            if errors:
                rows.append([
                    kernel, name, f"{np.median(errors):.1e}", f"{max(errors):.1e}",
                    f"{max(known):.2f}" if known else NONE, _workspace(results, kernel, direction),
                ])  # fmt: skip
    header = ["kernel", "output", "median error", "worst error", "worst / library", "most GB extra"]
    return _table(header, rows)


def _outputs() -> Iterator[tuple[Direction, str]]:
    yield "forward", "out"
    for name in ("dq", "dk", "dv"):
        yield "backward", name


def _workspace(results: Results, kernel: str, direction: Direction) -> str:
    sizes = [
        record.config["workspace_bytes"]
        for (_, d, k), record in results.records.items()
        if (d, k) == (direction, kernel) and record.config.get("workspace_bytes") is not None
    ]
    return f"{max(sizes) / 1e9:.2f}" if sizes else NONE


def _missing(results: Results) -> str:
    """Refusals and errors, equal reasons together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for (case, direction, kernel), record in results.records.items():
        if record.status != "ok":
            key = (kernel, record.status, record.reason)
            reasons.setdefault(key, []).append(f"{case} {direction}")
    rows = [
        [kernel, status, reason.replace("|", "/"), str(len(cases)), cases[0]]
        for (kernel, status, reason), cases in reasons.items()
    ]
    return _table(["kernel", "", "reason", "times", "first"], rows) if rows else "Nothing.\n"


def plot(results: Results, path: Path) -> None:
    """TFLOP/s by mask and kernel, forward and backward, of the setting with the most figures."""
    # Imported here: matplotlib takes longer to load than the tables take to write.
    from matplotlib.figure import Figure

    setting, cases = max(_settings(results.cases), key=lambda item: _figures(results, item[1]))
    kernels = [k for k in results.kernels if any(k in results.rates(c, d) for c in cases
                                                 for d in DIRECTIONS)]  # fmt: skip
    kernels.sort(key=lambda name: name != BAND)
    figure = Figure(figsize=(max(7.0, 0.75 * len(cases)), 7.5), layout="constrained")
    for axis, direction in zip(figure.subplots(2, 1, sharex=True), DIRECTIONS):
        for index, kernel in enumerate(kernels):
            at = np.arange(len(cases)) + (index - (len(kernels) - 1) / 2) * 0.8 / len(kernels)
            heights = [results.rate(case, direction, kernel) or float("nan") for case in cases]
            color = COLORS[index % len(COLORS)]
            axis.bar(at, heights, 0.8 / len(kernels), color=color, label=kernel)
        axis.set_ylabel(f"{direction}, TFLOP/s by exact area")
        axis.grid(axis="y", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.set_xticks(
            range(len(cases)), [c.mask.replace("_", " ") for c in cases], rotation=40, ha="right",
            fontsize=8,
        )  # fmt: skip
    figure.axes[0].set_title(f"{results.architecture}, {setting}")
    figure.axes[0].legend(fontsize=8, ncols=len(kernels))
    figure.savefig(path, dpi=110)


def _figures(results: Results, cases: Sequence[Case]) -> int:
    return sum(len(results.rates(case, d)) for case in cases for d in DIRECTIONS)
