"""The benchmark schema: what a record must hold, and what must never be in it."""

import json
import platform
from pathlib import Path

import pytest
import torch

from ringattn.benchmarks.record import SCHEMA, Record, Recorder, anonymous, read_records
from ringattn.errors import UserError


def test_every_record_has_the_whole_schema(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    recorder = Recorder(path)
    recorder.ok("attention", "causal", 1.5, "ms", spread=0.1, config={"heads": 8})
    recorder.refused("attention", "fp8", "ms", "dtype fp8: no kernel\ncomputes it")
    recorder.error("attention", "huge", "ms", "out of memory", {"seq_len": 2**30})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "refused", "error"]
    assert all(tuple(row) == SCHEMA for row in rows)
    assert rows[0]["value"] == 1.5
    assert rows[1]["value"] is None
    assert rows[1]["reason"] == "dtype fp8: no kernel computes it"
    assert rows[0]["versions"]["torch"] == torch.__version__
    assert rows[0]["hardware"]["cpu"]
    assert rows[0]["hardware"]["gpu"] is None or torch.cuda.is_available()
    assert rows[0]["commit"] is None or len(rows[0]["commit"].removesuffix("-dirty")) == 40
    assert [json.loads(record.to_json()) for record in read_records(path)] == rows


def test_a_recorder_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Recorder(path).ok("plan", "ring", 3.0, "ms")
    again = Recorder(path)
    assert again.has("plan", "ring")
    assert not again.has("plan", "direct")
    again.ok("plan", "direct", 4, "ms")
    assert [record.case for record in read_records(path)] == ["ring", "direct"]


@pytest.mark.parametrize(
    "fields, rule",
    [
        ({"status": "maybe"}, "is one of"),
        ({"value": None}, "ok has a value"),
        ({"status": "refused", "reason": "so"}, "refused and error have a reason and no value"),
        ({"status": "error", "value": None}, "refused and error have a reason and no value"),
        ({"reason": "but"}, "no reason"),
        ({"value": float("nan")}, "must be finite"),
        ({"spread": float("inf")}, "must be finite"),
        ({"unit": ""}, "none of them may be empty"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(fields: dict, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        Record(**{"name": "plan", "case": "ring", "value": 1.0, "unit": "ms"} | fields)


@pytest.mark.parametrize("line", ["{", '{"name": "x"}', '{"colour": 1}', "[]"])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    Recorder(path).ok("plan", "ring", 3.0, "ms")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"results.jsonl:2: .* is not a benchmark record"):
        Recorder(path)


def test_no_home_folder_and_no_host_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "me" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "home" / "me" / "work")
    monkeypatch.setattr(platform, "node", lambda: "node17")
    config = {"run": Path.cwd() / "runs" / "a", "hosts": ["node17:29500", "node170"]}
    assert anonymous(config) == {"run": "./runs/a", "hosts": ["HOST:29500", "node170"]}
    assert anonymous(f"no {Path.home()}/data, no {Path.home()}2") == (
        f"no ~/data, no {Path.home()}2"
    )
    record = Recorder("r.jsonl").error("plan", "ring", "ms", f"node17: {Path.cwd()}/x.py failed")
    assert record.reason == "HOST: ./x.py failed"


def test_a_last_record_that_was_cut_off_is_passed_over_and_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    recorder = Recorder(path)
    recorder.ok("name", "first", 1.0, "s")
    recorder.ok("name", "second", 2.0, "s")
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-20], encoding="utf-8")
    assert [record.case for record in read_records(path)] == ["first"]
    again = Recorder(path)
    assert again.has("name", "first")
    assert not again.has("name", "second")
    again.ok("name", "second", 2.0, "s")
    assert [record.case for record in read_records(path)] == ["first", "second"]


def test_a_last_record_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Recorder(path).ok("name", "first", 1.0, "s")
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    again = Recorder(path)
    again.ok("name", "second", 2.0, "s")
    assert [record.case for record in read_records(path)] == ["first", "second"]


def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, rule in (("binary.jsonl", "is not a file"), (".", "cannot be read")):
        with pytest.raises(UserError, match=rule):
            read_records(tmp_path / name)
