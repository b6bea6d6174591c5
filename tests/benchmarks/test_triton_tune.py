"""The search for block sizes, without a GPU: what is tried, left out, chosen and written."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.benchmarks import triton_tune
from ringattn.benchmarks.record import read_records
from ringattn.benchmarks.triton_compile import PARTS, Resources, Variant
from ringattn.benchmarks.triton_tune import TABLE, Search
from ringattn.benchmarks.tune_cases import Entry, as_text, candidates, entries, fault, shipped
from ringattn.benchmarks.tune_measure import RUNS, Workbench, WrongResult
from ringattn.benchmarks.tune_records import NAME, Log, choose
from ringattn.benchmarks.tune_table import as_list, merged, read_table, table_text
from ringattn.kernels.triton_configs import BlockConfig

ENTRY, ARCH = Entry("forward", 128), "sm_90"
GOOD = Resources(128, shared=100_000, spilled=0, serialized=False, trapped=False)


class Ready:
    """A compilation that has ended, or never will."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self, timeout: float) -> Any:
        if self.value is None:
            raise multiprocessing.TimeoutError
        return self.value


def search(
    path: Path,
    rate: Callable[[Entry, str, BlockConfig], float],
    used: Callable[[Variant], Any] = lambda _: GOOD,
    most: int = 4,
    seconds: float = 1e9,
) -> bool:
    submit: Any = lambda variant: Ready(used(variant))  # noqa: E731
    return Search(Log(path, ARCH), seconds, most, submit, rate).run([ENTRY])


def test_the_order_and_number_of_entries() -> None:
    first = [str(entry) for entry in entries()[:4]]
    assert first == [
        "forward-d128", "keys-d128", "forward-listed-d128", "keys-listed-d128",
    ]  # fmt: skip
    assert len(entries()) == len(set(entries())) == len(PARTS) * 2 * 2 * (3 + 2)
    assert entries(["keys"], [256], ["bf16", "fp32"], [True]) == [
        Entry("keys", 256, 2, True, listed) for listed in (False, True)
    ]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_86"])
def test_candidates_start_with_the_shipped_one(arch: str) -> None:
    for entry in entries():
        made = candidates(entry, arch, 32)
        assert made[0] == shipped(entry, arch)
        assert len(made) == len(set(made))
        assert len(made) > 8
        assert arch in ("sm_90", "sm_100") or not any(config.tma for config in made)
    assert any(config.tma for config in candidates(ENTRY, "sm_90", 8))


@pytest.mark.parametrize(
    "bad, reason",
    [
        (Resources(255, 1000, 8, False, False), "8 bytes spilled (shared)"),
        (Resources(255, 1000, 0, True, False), "matrix instructions serialized (shared)"),
        (
            Resources(255, 300_000, 0, False, False),
            "300000 bytes of shared memory, limit 232448 (shared)",
        ),
        ("ValueError: no", "ValueError: no (shared)"),
    ],
)
def test_what_does_not_compile_well_is_left_out(bad: Resources | str, reason: str) -> None:
    variants = Entry("keys", 64).variants(ARCH, shipped(ENTRY, ARCH))
    assert fault(variants, [GOOD] * len(variants)) == ""
    assert fault(variants, [GOOD, bad]) == reason
    assert fault(ENTRY.variants(ARCH, shipped(ENTRY, ARCH)), [bad]).endswith("(plain)")


def test_a_search_records_resumes_and_chooses(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    _, spills, wrong, fast = candidates(ENTRY, ARCH, 4)

    def used(variant: Variant) -> Resources:
        return Resources(255, 0, 8 * (variant.config == spills), False, False)

    def rate(entry: Entry, mask: str, config: BlockConfig) -> float:
        assert config != spills
        if config == wrong:
            raise WrongResult(f"{mask}: out is off by 1")
        return 200.0 if config == fast else 100.0

    assert not search(path, rate, used, seconds=0)
    assert not path.exists()
    assert search(path, rate, used)
    records = read_records(path)
    assert [r.status for r in records] == ["ok", "refused", "error", "ok"]
    assert "off by 1" in records[2].reason
    assert records[3].config["rates"] == dict.fromkeys(RUNS, 200.0)
    assert records[3].value == pytest.approx(200.0)
    assert triton_tune.found(Log(path, ARCH)) == {ENTRY: fast}
    assert search(path, lambda *_: pytest.fail("tried again"), used)
    assert len(read_records(path)) == 4
    assert not triton_tune.found(Log(path, "sm_100"))


def test_slow_ones_and_late_ones_are_not_timed_further(tmp_path: Path) -> None:
    path, asked = tmp_path / "tune.jsonl", []
    now, late, slow = candidates(ENTRY, ARCH, 3)

    def rate(entry: Entry, mask: str, config: BlockConfig) -> float:
        asked.append((mask, config))
        return 100.0 if config == now else 50.0

    search(path, rate, lambda v: None if v.config == late else GOOD, most=3)
    assert [r.status for r in read_records(path)] == ["ok", "refused"]
    assert [mask for mask, config in asked if config == slow] == [RUNS[0]]
    assert not Log(path, ARCH).has(ENTRY, late)


def test_what_ended_the_process_is_recorded(tmp_path: Path) -> None:
    path, config = tmp_path / "tune.jsonl", shipped(ENTRY, ARCH)
    Log(path, ARCH).begin(ENTRY, config)
    assert Log(path, ARCH).has(ENTRY, config)
    (record,) = read_records(path)
    assert (record.name, record.reason) == (NAME, "the process ended while this ran")


def test_the_shipped_one_stays_unless_another_gains() -> None:
    now, other = BlockConfig(128, 64, 8, 2), BlockConfig(64, 64, 4, 2)
    assert choose({now: 100.0, other: 100.9}, now) == now
    assert choose({now: 100.0, other: 101.1}, now) == other
    assert choose({other: 1.0}, now) == other


def test_the_table_keeps_its_form_and_entries() -> None:
    table, config = read_table(TABLE), BlockConfig(64, 32, 4, 3, True)
    assert table_text(table) == TABLE.read_text(encoding="utf-8")
    runs, listed = (Entry("keys", 64, 4, True, listed) for listed in (False, True))
    made = merged(table, ARCH, {runs: config})
    assert made[ARCH][runs.name]["64"] == as_list(config) == [64, 32, 4, 3, True]
    assert made[ARCH][listed.name]["64"] == as_list(shipped(listed, ARCH))
    made[ARCH][runs.name]["64"] = table[ARCH][runs.name]["64"]
    del made[ARCH][listed.name]
    kept = {name: dims for name, dims in table[ARCH].items() if name != listed.name}
    assert made == {**table, ARCH: kept}
    both = merged(table, ARCH, {listed: config})
    assert both[ARCH][listed.name]["64"] == as_list(config)
    assert both[ARCH][runs.name] == table[ARCH][runs.name]
    new = merged(table, "sm_120", {ENTRY: config})
    assert {name: new[name] for name in table} == table
    assert new["sm_120"].keys() == table["default"].keys() | {"forward-listed"}
    assert json.loads(table_text(new)) == new


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_held_to_the_matmul_kernel(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(
        device=torch.device("cpu"), head_dim=16, dtype=torch.bfloat16, softcap=4.0,
        seq_len=256, heads=(4, 2), seconds=1e-9,
    )  # fmt: skip
    config = BlockConfig(64, 64, 4, 1)
    assert bench.rate(part, "causal", config) > 0
    assert bench.rate(part, "blocks_uniform", config) > 0
    wanted = bench._reference("forward" if part == "forward" else "backward", "causal")
    name = {"forward": "out", "queries": "dq"}.get(part, "dk")
    wanted[name][:, -1] += 1
    with pytest.raises(WrongResult, match=f"causal: {name} is off by"):
        bench.rate(part, "causal", config)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        triton_tune.main([])
    assert ended.value.code == 2
    assert "device=cpu: block sizes are found by timing on CUDA" in capsys.readouterr().err


COMPILED = """
from ringattn.benchmarks.triton_tune import attempt
from ringattn.benchmarks.tune_cases import Entry, shipped
entry = Entry("queries", 64)
for arch in ("sm_80", "sm_90"):
    print(attempt(entry.variants(arch, shipped(entry, arch))[0]))
"""


def test_variants_compile_as_they_launch() -> None:
    """In a process of its own: this one interprets Triton's kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("Resources(") and "spilled=0" in line for line in lines)


def test_texts() -> None:
    assert as_text(BlockConfig(128, 64, 8, 2, True)) == "128x64-w8-s2-tma"
