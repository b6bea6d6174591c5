"""What was run: masks × variants × ranks with a figure, a refusal or an error, and every reason."""

from collections.abc import Iterable, Mapping, Sequence

from ringattn.benchmarks.report import units
from ringattn.benchmarks.report.cells import OWN, Cell
from ringattn.benchmarks.report.markup import Html, element, folded, joined, paragraph
from ringattn.benchmarks.report.points import variant_of
from ringattn.benchmarks.report.tables import GLYPHS, WORDS, list_limited, scrolled

MOST_ROWS = 400  # of one matrix
MOST_RANKS = 4  # numbers of ranks beside one another below each variant
MOST_REASONS = 400  # of one suite
MOST_CASES = 40  # named below a reason
_ORDER = ("error", "refused", "ok")


def coverage(suite: str, cells: Sequence[Cell]) -> Html:
    """The matrix of a suite, and a list of what lacks a figure."""
    several = len({c.text("method") for c in cells if c.contender == OWN}) > 1
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.mask, variant_of(suite, cell, several), cell.ranks), []).append(cell)
    masks = list(dict.fromkeys(key[0] for key in found))
    variants = list(dict.fromkeys(key[1] for key in found))
    ranks = sorted({key[2] for key in found})
    missing = [
        f"{mask} × {variant}" + (f" × P={p}" if len(ranks) > 1 else "")
        for mask in masks
        for variant in variants
        for p in ranks
        if (mask, variant, p) not in found
    ]
    rows, heads = _rows(found, masks, variants, ranks)
    matrix = element(
        "table", element("thead", *heads), element("tbody", *rows[:MOST_ROWS]), class_="grid cover"
    )
    absent = None
    if missing:
        text = f"Not in these results: {units.counted(len(missing), 'combination')}"
        absent = folded(text, paragraph(list_limited(missing, 400)))
    if len(rows) > MOST_ROWS:
        left = f"{len(rows) - MOST_ROWS:,} more rows are left out here."
        absent = joined(paragraph(left, class_="note"), absent)
    grid = scrolled(matrix, "scroll fits")
    return joined(_key(cells, len(missing)), grid, absent, reasons(cells))


def _rows(
    found: Mapping[tuple[str, str, int], Sequence[Cell]],
    masks: Sequence[str],
    variants: Sequence[str],
    ranks: Sequence[int],
) -> tuple[list[Html], list[Html]]:
    """Rows and heads: a row per mask; per mask and variant where numbers of ranks are many."""
    if len(ranks) <= MOST_RANKS:
        rows = [
            element(
                "tr", element("th", mask, scope="row"),
                *[_mark(found.get((mask, v, p)), p == ranks[0]) for v in variants for p in ranks],
            )
            for mask in masks
        ]  # fmt: skip
        return rows, _heads(variants, ranks)
    rows = [
        element(
            "tr", element("th", f"{mask} · {variant}", scope="row"),
            *[_mark(found.get((mask, variant, p)), False) for p in ranks],
        )
        for mask in masks
        for variant in variants
        if any((mask, variant, p) in found for p in ranks)
    ]  # fmt: skip
    numbers = [element("th", units.count(p), scope="col") for p in ranks]
    head = element("th", "ranks or GPUs", scope="col")
    return rows, [element("tr", head, *numbers)]


def _heads(variants: Sequence[str], ranks: Sequence[int]) -> list[Html]:
    """One or two lines of heads: variants, and below each the numbers of ranks."""
    if len(ranks) == 1:
        names = [element("th", element("span", v), scope="col", class_="up") for v in variants]
        return [element("tr", element("th", "mask", scope="col"), *names)]
    names = [
        element("th", v, scope="colgroup", colspan=len(ranks), class_="first") for v in variants
    ]
    numbers = [
        element("th", units.count(p), scope="col", class_="first" if p == ranks[0] else None)
        for _ in variants
        for p in ranks
    ]
    mask = element("th", "mask", scope="col")
    return [
        element("tr", mask, *names),
        element("tr", element("th", "ranks or GPUs", scope="col"), *numbers),
    ]


def _mark(cells: Sequence[Cell] | None, first: bool) -> Html:
    """One combination: over all lengths, directions and packs."""
    edge = " first" if first else ""
    if cells is None:
        return element("td", GLYPHS["missing"], class_=f"missing{edge}", title=WORDS["missing"])
    counts = {status: sum(c.record.status == status for c in cells) for status in _ORDER}
    status = next(status for status in _ORDER if counts[status])
    texts = dict.fromkeys(c.record.reason for c in cells if c.record.reason)
    tip = ", ".join(f"{n} {WORDS[s]}{'s' * (n > 1 and s == 'ok')}" for s, n in counts.items() if n)
    if texts:
        tip += ": " + "; ".join(texts)[:300]
    partly = status != "ok" and counts["ok"] > 0
    glyph = GLYPHS["ok"] + GLYPHS[status] if partly else GLYPHS[status]
    return element("td", glyph, class_=status + edge, title=tip)


def _key(cells: Sequence[Cell], missing: int) -> Html:
    """What the signs mean, and how many records each has."""
    counts = {s: sum(c.record.status == s for c in cells) for s in ("ok", "refused", "error")}
    items = [
        element("li", element("i", GLYPHS[s], class_=s), f"{WORDS[s]}: {units.count(n)}")
        for s, n in counts.items()
    ]
    if missing:
        sign = element("i", GLYPHS["missing"], class_="missing")
        items.append(element("li", sign, f"{WORDS['missing']}: {units.count(missing)}"))
    return element("ul", *items, class_="legend")


def reasons(cells: Iterable[Cell]) -> Html:
    """Every reason for which there is no figure, with the cases it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if not cell.ok:
            key = (cell.record.status, cell.record.reason)
            found.setdefault(key, []).append(cell.record.case)
    if not found:
        return Html()
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != "error", -len(item[1])))
    items = [
        element(
            "li", element("i", GLYPHS[status], class_=status), " ",
            element("b", f"{WORDS[status]}: {reason}"), " ",
            element("span", f"{len(cases):,} × ", list_limited(cases, MOST_CASES), class_="cases"),
        )
        for (status, reason), cases in ordered[:MOST_REASONS]
    ]  # fmt: skip
    rest = len(ordered) - MOST_REASONS
    note = (
        paragraph(f"{rest:,} more reasons are in the files.", class_="note") if rest > 0 else None
    )
    total = sum(len(cases) for cases in found.values())
    counts = f"{units.counted(total, 'case')}, {units.counted(len(ordered), 'reason')}"
    title = f"Why there is no figure: {counts}"
    return folded(title, element("ul", *items, class_="reasons"), note, opened=len(ordered) <= 12)
