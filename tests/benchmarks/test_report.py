"""``ringattn report``: one page that stands alone, holds everything and trusts nothing."""

import html
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ringattn.benchmarks.record import Record
from ringattn.benchmarks.report import report
from ringattn.benchmarks.report.markup import element
from ringattn.benchmarks.report.plot import axis, spread_apart
from ringattn.benchmarks.report.units import number, scale_of
from ringattn.errors import UserError
from ringattn.launch.main import main
from tests.benchmarks import report_records

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text; complains of wrong nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(path: Path, records: Sequence[Record], **options: Any) -> str:
    return report([report_records.write(path / "all.jsonl", records)], **options)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Record], str, Page]:
    """Records of all suites, and their page with two plans, as text and parsed."""
    masks = ("full", "documents_causal", "blocks_uniform", "per_head")
    records = report_records.all_suites(masks)
    text = page_of(tmp_path_factory.mktemp("report"), records, plans=2)
    return records, text, Page(text)


def assert_alone(text: str, page: Page | None = None) -> None:
    """A page that loads nothing and leads nowhere else."""
    page = page or Page(text)
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        target = attributes.get("href")
        assert target is None or target.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\(", text)
    assert not page.named("link")
    assert len(page.named("script")) == 1


def test_the_page_stands_alone(everything: tuple[list[Record], str, Page]) -> None:
    assert_alone(*everything[1:])


def test_links_of_the_page_lead_to_its_sections(everything: tuple[list[Record], str, Page]) -> None:
    page = everything[2]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [str(attributes["href"])[1:] for attributes in page.named("a")]
    assert len(ids) == len(set(ids))
    assert links
    assert set(links) <= set(ids)


def test_all_suites_have_charts_tables_and_words(
    everything: tuple[list[Record], str, Page],
) -> None:
    page = everything[2]
    for head in ("Kernels", "Methods", "Masks and peers", "Training", "Scaling", "Planning"):
        assert head in page.text
    for word in ("measured on CPU", "simulated", "Weak scaling", "Strong scaling", "loss"):
        assert word.lower() in page.text.lower()
    assert "ringattn bench scaling --simulate" in page.text
    assert "Example CPU, 2 cores" in page.text
    assert "0123456789ab" in page.text
    titles = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert len(titles) > 30
    assert all(attributes["aria-label"] for attributes in titles)


def test_whatever_has_no_figure_has_its_reason(everything: tuple[list[Record], str, Page]) -> None:
    records, _, page = everything
    reasons = {record.reason for record in records if record.status != "ok"}
    assert len(reasons) > 10
    shown = page.text
    missing = [reason for reason in reasons if reason not in shown]
    assert not missing


def test_cells_that_were_not_run_are_listed(tmp_path: Path) -> None:
    records = [
        report_records.record(
            "bench.methods", {"mask": mask, "method": method, "ranks": 2}, value=1.0
        )
        for mask, method in (("full", "ring"), ("causal", "burst"))
    ]
    text = Page(page_of(tmp_path, records, plans=0)).text
    assert "full × burst" in text
    assert "causal × ring" in text


def test_equal_records_give_equal_pages(tmp_path: Path) -> None:
    records = [*report_records.kernels(), *report_records.train()]
    pages = {page_of(tmp_path / name, records, plans=1) for name in ("one", "two")}
    assert len(pages) == 1


def test_every_text_of_a_record_is_escaped(tmp_path: Path) -> None:
    texts = ("mask", "method", "layout", "kernel", "contender", "direction", "lengths", "dtype",
             "command", "device", "cluster", "links", "model", "quantity", "scaling")  # fmt: skip
    records = []
    for name in ("kernels", "methods", "masks", "train", "scaling", "simulated", EVIL):
        for status in ("ok", "error"):
            for simulated in (True, False):
                config = dict.fromkeys(texts, EVIL) | {
                    EVIL: EVIL + status, "simulated": simulated, "ranks": 2, "losses": [2.0, 1.0],
                }  # fmt: skip
                ok = status == "ok"
                record = Record(
                    name=EVIL if name == EVIL else f"bench.{name}",
                    case=f"{EVIL}{status}{simulated}",
                    value=1.0 if ok else None, unit=EVIL, status=status, reason="" if ok else EVIL,
                    hardware={"cpu": EVIL, "gpu": EVIL, "gpus": 1}, versions={EVIL: EVIL},
                    commit=EVIL, config=config,
                    figures={EVIL: 1.0, "peak_bytes": 2.0, "error_out": 1e-3} if ok else {},
                )  # fmt: skip
                records.append(record)
    text = page_of(tmp_path, records, title=EVIL)
    assert_alone(text)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert html.escape(EVIL, quote=True) in text


@pytest.mark.parametrize("suite", ["kernels", "methods", "masks", "train", "scaling", "simulated"])
def test_a_single_record_is_enough(tmp_path: Path, suite: str) -> None:
    make: dict[str, Callable[[], Any]] = {
        name: getattr(report_records, name)
        for name in ("kernels", "methods", "masks", "train", "scaling", "simulated")
    }
    record = next(iter(make[suite]()))
    assert_alone(page_of(tmp_path, [record], plans=0))


def test_bare_records_are_enough(tmp_path: Path) -> None:
    # No config, no figures, no hardware, and a refusal alone.
    records = [
        Record(name="bench.methods", case="a", value=0.0, unit="TFLOP/s"),
        Record(name="bench.scaling", case="b", value=None, unit="x", status="refused", reason="no"),
        Record(name="bench.train", case="c", value=-1.5, unit="tokens/s"),
        Record(name="kernels", case="d", value=3.0, unit="TFLOP/s"),
        Record(name="method_table", case="e", value=3.0, unit="TFLOP/s"),
        Record(name="measured_methods", case="f", value=3.0, unit="s"),
    ]  # fmt: skip
    assert_alone(page_of(tmp_path, records))


def test_the_committed_results_render() -> None:
    page = report([RESULTS], plans=1)
    assert_alone(page)
    text = Page(page).text
    assert "layout striped: has too many tiles; choose longer ranges" in text
    assert "one_process" in text
    assert "simulated h100_sxm" in text


def test_the_later_of_equal_cases_counts(tmp_path: Path) -> None:
    records = [
        Record(name="bench.methods", case="same", value=value, unit="x") for value in (131.0, 7.5)
    ]
    text = Page(page_of(tmp_path, records)).text
    assert "1 record was left out" in text
    assert "7.50" in text
    assert "131" not in text


def test_packs_are_one_point_with_their_median(tmp_path: Path) -> None:
    config = {"mask": "documents", "method": "ring", "ranks": 2, "layout": "zigzag"}
    records = [
        report_records.record("bench.methods", config | {"pack": pack}, value=value)
        for pack, value in enumerate((1.0, 2.0, 6.0))
    ]
    text = Page(page_of(tmp_path, records, plans=0)).text
    assert "All figures (1 row)" in text
    assert "2.00" in text


def test_large_tables_say_what_they_leave_out(tmp_path: Path) -> None:
    records = [Record(name="many", case=f"case {k}", value=float(k), unit="s") for k in range(3000)]
    text = page_of(tmp_path, records)
    assert "1,800 of 3,000 rows are left out here" in text
    assert len(text) < 1_500_000


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("absent.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "holds no record"),
        ("metrics.jsonl", '{"step": 1}\n', "is not a benchmark record"),
        ("list.jsonl", "[1, 2]\n", "is not a benchmark record"),
        ("config.jsonl", '{"name":"a","case":"b","value":1,"unit":"s","config":[]}\n', "config"),
        ("nan.jsonl", '{"name":"a","case":"b","value":NaN,"unit":"s"}\n', "must be finite"),
        ("picture.jsonl", "\udcff\udcfe", "is not a file of benchmark records"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "page.html").exists()


def test_an_empty_folder_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without .jsonl"):
        report([tmp_path])
    path = report_records.write(tmp_path / "a.jsonl", list(report_records.train()))
    assert main(["report", str(path), "--out", str(tmp_path)]) == 2
    assert main(["report", str(path), "--plans", "-1"]) == 2


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_records.write(tmp_path / "results" / "a.jsonl", list(report_records.train()))
    out = tmp_path / "new" / "page.html"
    arguments = ["report", str(tmp_path / "results"), "--out", str(out), "--title", "Mine"]
    assert main([*arguments, "--plans", "0"]) == 0
    assert "<h1>Mine</h1>" in out.read_text(encoding="utf-8")
    assert str(out) in capsys.readouterr().out


def test_attributes_and_children_are_escaped() -> None:
    made = element("td", "a<b", title='x"y', data_v=1, hidden=True, open=False, class_=None)
    assert made == '<td title="x&quot;y" data-v="1" hidden>a&lt;b</td>'


@pytest.mark.parametrize(
    "value, unit, shown",
    [
        (0.0621, "TFLOP/s", "62.1 GFLOP/s"), (523.4, "TFLOP/s", "523 TFLOP/s"),
        (0.00042, "s", "420 µs"), (16777216, "bytes", "16.0 MiB"), (0.0312, "share", "3.12 %"),
        (1234.5, "tokens/s", "1,234 tokens/s"), (0, "s", "0 µs"), (3.21e-7, "relative error",
        "3.2e−7 relative error"),
    ],
)  # fmt: skip
def test_units_fit_the_values(value: float, unit: str, shown: str) -> None:
    assert scale_of([value], unit).with_unit(value) == shown


def test_numbers_have_three_digits() -> None:
    assert [number(v) for v in (1.0, 0.5, 1234567, -3.14159, 0.00123)] == [
        "1.00", "0.500", "1,234,567", "−3.14", "0.00123",
    ]  # fmt: skip


def test_axes_hold_their_values() -> None:
    for values in ([0.0], [5.0, 5.0], [-3.0, 2.0], [1e-9, 1e9], [0.0, 1e-7], [-5.0, -4.0]):
        made = axis(values, 0, 100)
        assert made.low < made.high
        assert made.log == (values == [1e-9, 1e9])
        assert all(0 <= made.at(value) <= 100 for value in values)
        assert made.low <= min(values)
        assert max(values) <= made.high + 1e-9
        assert len(made.ticks) >= 2


def test_marks_that_would_cover_each_other_are_set_apart() -> None:
    assert spread_apart([10, 50, 12, 90], 5) == [-0.5, 0.0, 0.5, 0.0]
