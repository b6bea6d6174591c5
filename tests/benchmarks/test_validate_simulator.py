"""The validator takes any table, counts misses, and scores as it says."""

import json

import numpy as np
import pytest

from ringattn.benchmarks import validate_simulator as validator
from ringattn.benchmarks.simulator.records import Published, parse_row, read
from ringattn.benchmarks.simulator.score import Scored, score
from tests.benchmarks.simulator_rows import ATTENTION, STEP, write


def run(capsys, *argv: str) -> dict:
    """The validator's JSON."""
    assert validator.main([*argv, "--json", "--rows"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_of_every_kind_are_predicted(tmp_path, capsys):
    path = write(
        tmp_path / "t.csv",
        ATTENTION,
        ATTENTION | {"metric": "bwd_time", "unit": "ms", "value": "20", "method": "zigzag ring v2"},
        ATTENTION | {"mask": "doc_causal", "hardware": "NVIDIA H100 SXM5 80GB HBM3"},
        ATTENTION | {"mask": "shared question", "method": "MagiAttention native", "gpus": "16"},
        STEP,
        STEP | {"metric": "mfu", "value": "41%", "unit": "%", "hardware": "nvidia-a100 (80 GB)"},
        STEP | {"metric": "step_time", "value": "30", "unit": "s", "method": "fsdp2"},
        STEP | {"metric": "peak_memory", "value": "50", "unit": "GiB", "checkpointing": ""},
        STEP | {"metric": "oom", "value": "OOM", "unit": "verdict", "seq_len": "4194304"},
        STEP | {"metric": "max_seq_len", "value": "400000", "unit": "tokens", "seq_len": ""},
        STEP | {"model": "Qwen2.5-7B", "layers": "", "hidden": "", "heads_q": "", "heads_kv": "",
                "head_dim": "", "ffn": "", "vocab": "", "hardware": "Quux 9000", "gpus": ""},
    )  # fmt: skip
    found = run(capsys, str(path))
    assert [g["coverage"] for g in found["groups"].values()] == [1.0] * len(found["groups"])
    assert not found["misses"]
    values = [row["predicted"] for row in found["rows"]]
    assert all(value > 0 for value in values)
    masks = {"attention: dense", "attention: documents", "attention: other masks"}
    steps = {"end to end: MFU", "end to end: time", "memory", "out of memory"}
    assert masks | steps <= set(found["groups"])
    # 128K tokens of a 7B model on an A800 take a second per thousand, and fit; 4M do not.
    assert values[4] == pytest.approx(900, rel=0.3)
    assert values[8] > 1.1


def test_a_row_that_cannot_be_predicted_is_a_miss_with_its_reason(tmp_path, capsys):
    path = write(
        tmp_path / "t.csv",
        ATTENTION,
        ATTENTION | {"seq_len": ""},
        STEP | {"metric": "loss", "unit": "nats"},
    )
    found = run(capsys, str(path))
    reasons = [(miss["line"], miss["reason"].split(":")[0]) for miss in found["misses"]]
    assert reasons == [(3, "seq_len"), (4, "metric 'loss'")]
    assert found["groups"]["attention: dense"]["coverage"] == 0.5


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "metric,value\n"])
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "t.csv"
    path.write_text(content)
    assert validator.main([str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_missing_columns_and_names_fall_back(tmp_path):
    path = write(tmp_path / "t.csv", STEP, columns=["metric", "value", "unit", "seq_len", "model"])
    (row,) = read(path)
    assert (row.gpus, row.cp, row.mask, row.heads) == (8, 8, "causal", (32, 32))
    assert row.shape is not None
    assert row.shape.layers == 32


def _scored(value: float, predicted: float | None, **changes: str) -> Scored:
    entry = ATTENTION | {"value": str(value)} | changes
    return Scored(_parsed(entry), predicted, "" if predicted else "why")


def _parsed(entry: dict[str, str]) -> Published:
    return parse_row(2, entry)


def test_scores_of_hand_made_predictions():
    found = [
        _scored(100, 110, method="a"),
        _scored(200, 180, method="b"),
        _scored(204, 170, method="c"),  # within 5 % of b: no pair; b is chosen, within 5 % of it
        _scored(50, 60, method="d", mask="full"),
        _scored(40, None, method="e", mask="full"),
    ]
    result = score(found)
    group = result["groups"]["attention: dense"]
    assert (group["rows"], group["predicted"]) == (5, 4)
    errors = np.array([0.1, 0.1, 1 - 170 / 204, 0.2])
    assert group["median"] == pytest.approx(np.median(errors))
    ranking = result["ranking"]["all, differ only in method"]
    assert (ranking["pairs"], ranking["ranked_right"]) == (2, 1.0)
    assert (ranking["choices"], ranking["near_best"]) == (1, 1.0)
    worse = score([_scored(100, 190, method="a"), _scored(200, 180, method="b")])["ranking"]
    assert worse["all, same setting"]["ranked_right"] == 0.0
    assert worse["all, same setting"]["near_best"] == 0.0
    times = {"metric": "fwd_time", "unit": "s"}
    fast = score([_scored(1, 1, method="a", **times), _scored(2, 3, method="b", **times)])
    assert fast["ranking"]["all, same setting"]["ranked_right"] == 1.0


def test_verdicts_near_and_far_from_the_limit():
    oom = {"metric": "oom", "unit": "verdict"} | {k: v for k, v in STEP.items() if k == "model"}
    entry = STEP | oom
    found = [
        Scored(_parsed(entry | {"value": "OOM"}), 1.05),
        Scored(_parsed(entry | {"value": "OOM"}), 0.5),
        Scored(_parsed(entry | {"value": "fits"}), 0.6),
    ]
    result = score(found)["verdicts"]
    assert result["out of memory"]["right"] == 0.5
    assert result["all"]["right"] == pytest.approx(2 / 3)
    assert (result["all"]["far_rows"], result["all"]["far_right"]) == (2, 0.5)


def test_values_that_are_held_out_do_not_reach_their_predictions(tmp_path):
    lengths = ("32768", "65536", "131072")
    steps = [
        STEP | {"seq_len": length, "value": value}
        for length, value in zip(lengths, ("2500", "1500", "900"), strict=True)
    ]
    kinds = STEP | {"metric": "peak_memory", "unit": "GiB", "value": "50"}
    changed = {"900": "300", "50": "70"}
    tables = [
        [*steps, kinds],
        [row | {"value": changed.get(row["value"], row["value"])} for row in [*steps, kinds]],
    ]
    found = []
    for number, table in enumerate(tables):
        rows = read(write(tmp_path / f"{number}.csv", *table))
        parts = ["out" if row.seq_len == 131072 else "in" for row in rows]
        found.append([s.value for s in validator.held_out(rows, parts)])
    assert found[0][2:] == found[1][2:]
    assert found[0][0] != found[1][0], "values that are known have to matter"


def test_a_length_that_its_note_calls_wrong_is_corrected():
    note = "SUSPECT: dense value equals the 128K sp=8 row, so the 256k label is probably wrong"
    assert parse_row(2, STEP | {"seq_len": "262144", "note": note}).seq_len == 131072
    assert parse_row(2, STEP | {"seq_len": "262144"}).seq_len == 262144


def test_units_of_memory_follow_the_source():
    memory = STEP | {"metric": "peak_memory", "unit": "GB", "value": "2"}
    assert parse_row(2, memory).value == 2e9
    assert parse_row(2, memory | {"source": "BurstAttention exp_res inference"}).value == 2**31


def test_a_source_that_counts_the_square_reports_more(tmp_path, capsys):
    flops = STEP | {"metric": "model_tflops_per_gpu", "unit": "TFLOP/s/GPU", "value": "150"}
    path = write(
        tmp_path / "t.csv",
        flops,
        flops | {"note": "sp_degree=4; dp=2; attention counted as full square"},
        flops | {"metric": "mfu", "unit": "", "value": "0.5"},
        STEP,
    )
    pairs, square, mfu, tokens = [r["predicted"] for r in run(capsys, str(path))["rows"]][:4]
    # Of a 7B model's causal operations at 128K, attention has 58 %; a square has twice the pairs.
    products = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    attention = 6 * 32 * 4096 * 131072
    assert pairs == pytest.approx(1e-12 * tokens * (6 * products + attention), rel=1e-3)
    assert square == pytest.approx(1e-12 * tokens * (6 * products + 2 * attention), rel=1e-3)
    assert mfu == pytest.approx(pairs / 312, rel=1e-3)


def test_odd_cells_never_end_the_report(tmp_path):
    odd = ("inf", "nan", "-8", "1e30", "", "?", "OOM")
    columns = ("gpus", "seq_len", "heads_q", "value", "layers", "hardware")
    small = {"seq_len": "8192", "gpus": "4", "note": ""}
    table = [
        kind | small | {column: cell}
        for kind in (STEP, ATTENTION | {"method": "allgather"})
        for column in columns
        for cell in odd
    ]
    found = validator.predicted(
        read(write(tmp_path / "t.csv", *table)), validator.load_calibration()
    )
    assert all(one.value is None or one.value > 0 for one in found)
    missed = [one for one in found if one.value is None]
    assert {one.reason.split(":")[0] for one in missed} == {"seq_len"}, "nothing else is needed"
    assert len(missed) == len(table) // len(columns)


def test_a_table_of_another_program_is_read(tmp_path):
    path = tmp_path / "t.csv"
    head = "Metric,Value,Unit,Model,Hardware,GPUs,Seq_Len,Note,Colour\n"
    row = 'tokens_per_s_per_gpu,"1,900",tokens/s/GPU,llama-7b,A100-80GB,8,65536,"cp=8; a;b",red\n'
    path.write_text("\ufeff" + head + row, encoding="utf-8")
    (found,) = read(path)
    assert (found.value, found.gpus, found.cp, found.note) == (1900.0, 8, 8, "cp=8; a;b")


def test_names_and_cells_that_nobody_knows_are_predicted(tmp_path, capsys, seed):
    rng = np.random.default_rng(seed)
    cells = {
        "hardware": ["H200-141GB", "H800", "RTX 4090", "A100-40GB PCIe", "MI300X", "GB200", "?"],
        "gpus": ["1", "2", "6", "16", "24", "", "many"],
        "gpus_per_node": ["8", "4", "", "0"],
        "heads_q": ["64", "12", ""],
        "heads_kv": ["8", "4", "1", ""],
        "head_dim": ["64", "128", "192", ""],
        "dtype": ["bf16", "fp16", "fp8", ""],
        "seq_len": ["4096", "16384", "12345", "32K"],
        "mask": ["full", "Varlen-Causal", "SWA 512", "prefix-lm", "block sparse 10%", "???", ""],
        "method": ["Ring P2P", "tile 4x2", "usp", "megatron cp", "kernel-fa4", "hybrid", "!", ""],
        "metric": ["fwd_tflops_per_gpu", "fwd+bwd time", "tflops", "bwd_rate"],
        "unit": ["TFLOP/s/GPU", "ms", "", "it/s"],
        "value": ["100", "1e2", "5"],
        "note": ["", "median of 0 runs", "kernel=unknown"],
    }  # fmt: skip
    rows = [{name: str(rng.choice(some)) for name, some in cells.items()} for _ in range(60)]
    found = run(capsys, str(write(tmp_path / "t.csv", *[ATTENTION | row for row in rows])))
    assert not found["misses"]
    assert all(0 < row["predicted"] < float("inf") for row in found["rows"])


def test_names_that_nobody_knows_are_predicted_and_told(tmp_path, capsys):
    unsized = {"layers": "", "hidden": ""}
    path = write(
        tmp_path / "t.csv",
        ATTENTION,
        ATTENTION | {"hardware": "z900", "method": "warpdrive", "mask": "spiral"},
        ATTENTION | {"hardware": "z900", "gpus": "0"},
        STEP | {"model": "gizmo", "checkpointing": "magic"},  # its sizes are stated
        STEP | {"model": "gizmo"} | unsized,
        STEP | {"model": "llama-7b"} | unsized,
        ATTENTION | {"hardware": "", "method": "", "mask": "", "gpus": ""},
    )
    found = run(capsys, str(path))
    assert not found["misses"]
    h100 = "hardware 'z900' as h100_sxm"
    assert {one["line"]: one["assumed"] for one in found["assumed"]} == {
        3: [h100, "method 'warpdrive' as ring", "mask 'spiral' as causal"],
        4: [h100, "gpus taken as 8 (stated '0')"],
        5: ["checkpointing 'magic' as none"],
        6: ["model 'gizmo' as llama-7b"],
    }
    assert validator.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"  assumed, 2 rows: {h100}") == 1
    assert len([line for line in lines if "assumed, " in line]) == 6


@pytest.mark.parametrize("kind", ["tokens_per_s_per_gpu", "step_time", "peak_memory", "mfu"])
def test_values_that_cannot_be_are_listed_and_not_scored(tmp_path, capsys, kind):
    values = ("abc", "nan", "inf", "-4", "0", "1e-320", "5 apples", "")
    good = STEP | {"metric": kind, "unit": "", "value": "0.5"}
    path = write(tmp_path / "t.csv", good, *(good | {"value": value} for value in values))
    found = run(capsys, str(path))
    for line, (value, told) in enumerate(zip(values, found["unreadable"], strict=True), start=3):
        assert (told["line"], told["metric"]) == (line, kind)
        assert told["reason"].startswith(f"value {value!r}" if value else "value is empty")
    assert all(group["rows"] == 1 for group in found["groups"].values())
    assert not found["misses"]
    assert validator.main([str(path)]) == 0
    assert f"  line 3 ({kind}) not scored: value 'abc' is no number" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["maybe", "nan", ""])
def test_verdicts_that_cannot_be_read_are_listed_and_not_scored(value):
    rows = [_parsed(STEP | {"metric": "oom", "unit": "", "value": v}) for v in ("OOM", value)]
    result = score([Scored(row, 2.0) for row in rows])
    assert result["groups"]["out of memory"]["rows"] == result["verdicts"]["all"]["rows"] == 1
    assert [one["metric"] for one in result["unreadable"]] == ["oom"]


@pytest.mark.parametrize(
    ("row", "units", "unknown"),
    [
        (STEP | {"metric": "step_time"}, {"ms/step": 1e-3, "s": 1, "": 1}, "fortnights"),
        (STEP | {"metric": "peak_memory"}, {"MiB per GPU": 2**20, "": 2**30}, "pages"),
        (STEP | {"metric": "mfu"}, {"%": 0.01, "": 0.01, "fraction": 0.01}, "furlongs"),
        (STEP, {"tokens/GPU/s": 1, "tok/s": 1, "tokens per second": 1, "": 1}, "samples/s"),
        (STEP, {"": 1}, "s"),
        (STEP | {"metric": "model_tflops"}, {"PFLOP/s": 1e3, "TFLOPS": 1, "": 1}, "GW"),
        (STEP | {"metric": "max_seq_len"}, {"tokens": 1, "": 1}, "pages"),
        (ATTENTION, {"TFLOP/s/GPU": 1, "iter/s": 1, "ms": 1e-3, "": 1}, "fortnights"),
        (ATTENTION | {"metric": "fwd_time"}, {"us": 1e-6, "": 1}, "TFLOP/s"),
    ],
)
def test_units_that_nobody_knows_are_not_scored(row, units, unknown):
    for unit, factor in units.items():
        found = _parsed(row | {"unit": unit, "value": "40"})
        assert (found.unreadable, found.value) == ("", pytest.approx(40 * factor)), unit
    found = _parsed(row | {"unit": unknown, "value": "40"})
    assert (found.unreadable, found.value) == (f"unit {unknown!r} is unknown", None)


def test_a_step_that_is_missed_is_listed_once(tmp_path, capsys):
    found = run(capsys, str(write(tmp_path / "t.csv", STEP | {"seq_len": ""})))
    assert [miss["line"] for miss in found["misses"]] == [2]


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('metric,value,note\n\nmfu,0.4,"a\nb"\n\n\nmfu,0.5,\n')
    assert [(row.line, row.note) for row in read(path)] == [(4, "a\nb"), (7, "")]


@pytest.mark.parametrize("kind", [ATTENTION, STEP, STEP | {"metric": "peak_memory", "unit": "GB"}])
@pytest.mark.parametrize("length", ["-5", "1e30", "1099511627777", "nan", "long"])
def test_a_length_that_cannot_be_is_not_called_missing(kind, length):
    (found,) = validator.predicted(
        [_parsed(kind | {"seq_len": length})], validator.load_calibration()
    )
    assert found.reason.startswith(f"seq_len: cannot be {length!r};")
    assert _parsed(kind | {"seq_len": "1099511627776"}).seq_len == 2**40
