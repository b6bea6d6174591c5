"""The whole page: head, navigation, sections, and where it is written."""

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path

from ringattn.benchmarks.report.attention import attention_section
from ringattn.benchmarks.report.cells import SUITES, Cell
from ringattn.benchmarks.report.findings import findings
from ringattn.benchmarks.report.load import load
from ringattn.benchmarks.report.markup import Html, anchor, element, joined, paragraph
from ringattn.benchmarks.report.older import cell_of
from ringattn.benchmarks.report.others import other_section, simulated_section
from ringattn.benchmarks.report.overview import commands, machines, summary
from ringattn.benchmarks.report.pictures import MOST_PLANS, plans_section
from ringattn.benchmarks.report.scaling import scaling_section
from ringattn.benchmarks.report.training import train_section
from ringattn.errors import UserError

TITLE = "ringattn benchmarks"
MOST_SECTIONS = 60
_HEADS = {
    "kernels": ("Kernels", "Attention of one rank, kernel by kernel."),
    "methods": ("Methods", "Every method of sharding attention on every mask."),
    "masks": ("Masks and peers", "Every mask, with other systems side by side in the same run."),
    "train": ("Training", "Whole training steps on the same model and data."),
    "scaling": ("Scaling", "How speed changes with the number of ranks or GPUs."),
    "simulated": ("Simulator beside measurements", "What the simulator predicts of what was run."),
}


def report(
    paths: Sequence[str | os.PathLike[str]], *, title: str = TITLE, plans: int = MOST_PLANS
) -> str:
    """The page of all records, the same for the same records.

    Args:
        paths: files of records, and folders of such files.
        title: of the page.
        plans: most plans that are pictured.

    Raises:
        UserError: see `ringattn.benchmarks.report.load.load`.
    """
    if plans < 0:
        raise UserError(f"plans={plans}", "must be at least 0", "pass 0 for none")
    loaded = load(paths)
    cells = [cell_of(record) for record in loaded.records]
    sections = [("findings", "What it says", findings(cells)), *_suites(cells)]
    pictures = plans_section(cells, plans)
    if pictures:
        sections.append(_end("plans", "Plans", pictures))
    sections.append(_end("commands", "Commands that repeat it", commands(cells)))
    sections.append(_end("machines", "Hardware and versions", machines(loaded)))
    shown = [section for section in sections if section[2]]
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in shown]
    head = element("header", element("h1", title), summary(loaded, cells))
    body = joined(
        element("nav", element("ul", *links), aria_label="Contents"),
        element("main", head, *[element("section", content) for _, _, content in shown]),
    )
    return _document(title, body)


def _suites(cells: Sequence[Cell]) -> list[tuple[str, str, Html]]:
    """Id, name and content of every suite, then of benchmarks that belong to none."""
    found: dict[str, list[Cell]] = {suite: [] for suite in SUITES}
    for cell in sorted(cells, key=lambda cell: cell.suite):
        found.setdefault(cell.suite, []).append(cell)
    sections = []
    for number, (suite, part) in enumerate(found.items()):
        if not part:
            continue
        if len(sections) == MOST_SECTIONS:
            rest = ", ".join(list(found)[number:][:100])
            left = f"{len(found) - number:,} more benchmarks are left out here: {rest}"
            sections.append(_end("rest", "Left out", paragraph(left)))
            break
        key = f"s{number}-{anchor(suite)[:40]}"
        name, content = _section(suite, part)
        sections.append((key, name, joined(element("h2", name, id=key), content)))
    return sections


def _section(suite: str, cells: Sequence[Cell]) -> tuple[str, Html]:
    if suite not in _HEADS:
        name = suite.replace("_", " ").replace("-", " ")
        return name[:1].upper() + name[1:], other_section(cells)
    name, about = _HEADS[suite]
    make = {
        "train": train_section, "scaling": scaling_section, "simulated": simulated_section,
    }.get(suite)  # fmt: skip
    content = make(cells) if make else attention_section(suite, cells)
    return name, joined(paragraph(about, class_="about"), content)


def _end(key: str, name: str, content: Html) -> tuple[str, str, Html]:
    return key, name, joined(element("h2", name, id=key), content)


def _document(title: str, body: Html) -> str:
    folder = importlib.resources.files("ringattn.benchmarks.report")
    style, script = (
        Html((folder / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js")
    )
    head = element(
        "head", element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title), element("style", style),
    )  # fmt: skip
    page = element("html", head, element("body", body, element("script", script)), lang="en")
    return f"<!doctype html>\n{page}\n"


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    title: str = TITLE,
    plans: int = MOST_PLANS,
) -> Path:
    """Writes the page; see `report`.

    Raises:
        UserError: also where `out` cannot be written.
    """
    target = Path(out)
    page = report(paths, title=title, plans=plans)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            str(out), f"cannot be written ({error.strerror})", "name another file"
        ) from None
    return target
