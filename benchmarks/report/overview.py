"""The head of the page: what ran, where, with what, and the commands that repeat it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.cells import SUITES, Cell
from ringattn.benchmarks.report.load import Loaded
from ringattn.benchmarks.report.markup import Html, element, folded, joined, paragraph
from ringattn.benchmarks.report.tables import list_limited, scrolled
from ringattn.benchmarks.report.units import counted

MOST_COMMANDS, MOST_MACHINES = 60, 40


def labels(cells: Sequence[Cell]) -> list[str]:
    """Where figures come from, in honest words: CPU, one GPU, several, simulated."""
    found = []
    for cell in cells:
        if cell.simulated:
            found.append("simulated")
            continue
        hardware = cell.record.hardware
        count = hardware.get("gpus") if isinstance(hardware.get("gpus"), int) else 0
        on_cpu = not hardware.get("gpu") or cell.text("device").startswith("cpu")
        gpus = "one GPU" if count == 1 else f"{count} GPUs"
        found.append("measured on CPU" if on_cpu else f"measured on {gpus}")
    return [name for name, _ in Counter(found).most_common()]


def summary(loaded: Loaded, cells: Sequence[Cell]) -> Html:
    """Tiles with counts, and a line of what is honest to say about them."""
    counts = Counter(cell.record.status for cell in cells)
    masks = {c.mask for c in cells if c.suite in SUITES and c.text("mask")}
    methods = {c.text("method") for c in cells if c.suite in SUITES and c.text("method")}
    contenders = {c.contender for c in cells if c.suite in SUITES}
    tiles = [
        ("records", len(cells)), ("figures", counts["ok"]), ("refused", counts["refused"]),
        ("errors", counts["error"]), ("masks", len(masks)), ("methods", len(methods)),
        ("contenders", len(contenders)),
    ]  # fmt: skip
    shown = [
        element("li", element("b", units.count(number)), element("span", name))
        for name, number in tiles
        if number or name in ("refused", "errors")
    ]
    tags = [
        element("span", name, class_="tag " + ("simulated" if name == "simulated" else "measured"))
        for name in labels(cells)
    ]
    note = None
    if loaded.replaced:
        were = "record was" if loaded.replaced == 1 else "records were"
        text = f"{loaded.replaced:,} {were} left out: later ones hold the same cases."
        note = paragraph(text, class_="note")
    return joined(
        element("p", *[part for tag in tags for part in (tag, " ")], class_="tags"),
        element("ul", *shown, class_="tiles"), note,
    )  # fmt: skip


def machines(loaded: Loaded) -> Html:
    """Hardware, versions and commits, with the benchmarks that ran there, and the files."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for record in loaded.records:
        key = (_hardware(record.hardware), _versions(record.versions), _commit(record.commit))
        found.setdefault(key, Counter())[record.name] += 1
    rows = [
        element(
            "tr", element("td", where), element("td", what),
            element("td", element("code", commit) if commit != "none" else commit),
            element("td", ", ".join(f"{name} ({n:,})" for name, n in sorted(names.items()))),
        )
        for (where, what, commit), names in list(found.items())[:MOST_MACHINES]
    ]  # fmt: skip
    heads = ("hardware", "versions", "commit", "benchmarks (records)")
    head = element("tr", *[element("th", name, scope="col") for name in heads])
    left = len(found) - MOST_MACHINES
    note = paragraph(f"{left} more are in the files.", class_="note") if left > 0 else None
    whole = element("table", element("thead", head), element("tbody", *rows), class_="figures")
    files = [f"{name} ({number:,})" for name, number in loaded.files]
    return joined(
        scrolled(whole), note,
        paragraph("Read from: ", list_limited(files, 60), class_="note"),
    )  # fmt: skip


def _hardware(values: Mapping[str, Any]) -> str:
    parts = [str(values.get("cpu") or "unknown CPU")]
    if values.get("cores"):
        parts.append(f"{values['cores']} cores")
    if values.get("memory_gib"):
        parts.append(f"{values['memory_gib']} GiB")
    gpu = f"{values.get('gpus') or 1} × {values['gpu']}" if values.get("gpu") else "no GPU"
    return ", ".join([*parts, gpu])


def _versions(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value)


def _commit(commit: str | None) -> str:
    if not commit:
        return "none"
    name, _, dirty = str(commit).partition("-")
    return name[:12] + (" with changes" if dirty else "")


def commands(cells: Sequence[Cell]) -> Html:
    """The commands that repeat the runs: whole suites, then parts of them, folded away."""
    found = Counter(cell.text("command") for cell in cells if cell.text("command"))
    if not found:
        return paragraph(
            "These records name no commands; see the benchmarks' README for the scripts: ",
            list_limited(list(dict.fromkeys(cell.record.name for cell in cells)), 40), ".",
        )  # fmt: skip
    whole: Counter[str] = Counter()
    for command, number in found.items():
        whole[command.partition(" --masks ")[0]] += number
    parts = Counter({name: number for name, number in found.items() if name not in whole})
    more = folded(f"Commands of parts ({len(parts):,})", _listed(parts)) if parts else None
    return joined(_listed(whole), more)


def _listed(found: Counter[str]) -> Html:
    """Commands with the number of records that they repeat, most first."""
    items = [
        element("li", element("code", command), " ", element("small", counted(number, "record")))
        for command, number in found.most_common(MOST_COMMANDS)
    ]
    left = len(found) - MOST_COMMANDS
    rest = f"{left:,} more commands are in the files."
    note = paragraph(rest, class_="note") if left > 0 else None
    return joined(element("ul", *items, class_="commands"), note)
