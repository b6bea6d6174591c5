"""One rank of many as a command, on the CPU with a small configuration."""

from pathlib import Path

import pytest
import torch

from ringattn.benchmarks import one_rank
from ringattn.benchmarks.one_rank import SMALL, make_plan, mask_of, ranks_to_play
from ringattn.benchmarks.one_rank_run import Player, make_carrier
from ringattn.benchmarks.record import read_records
from ringattn.cost import load_cluster
from ringattn.errors import UserError

CPU = torch.device("cpu")


def test_the_command_writes_records_and_a_table_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "one.jsonl"
    argv = ["x", "--ranks", "4", "--tokens", "48", "--plans", "auto", "ring/zigzag"]
    argv += ["--roles", "slowest", "1", "--seconds", "60", "--out", str(path)]
    monkeypatch.setattr(one_rank, "Setting", lambda: SMALL)  # also where there is a GPU
    monkeypatch.setattr("sys.argv", argv)
    one_rank.main()
    records = read_records(path)
    assert len(records) == 2 * 2 * 2
    for record in records:
        config = record.config
        assert (record.name, record.status, record.unit) == ("one_rank", "ok", "TFLOP/s")
        assert record.value is not None
        assert config["ms"] > 0
        assert config["predicted_ms"] > config["predicted_compute_ms"] > 0
        assert 0 <= config["exposed"] < 1
        assert config["kernel"] == "cpu_flash" == config["priced_as"]
        assert config["batches"] == 0 or config["late"]
    table = path.with_suffix(".md").read_text()
    assert "| ring/zigzag: ring over zigzag | 1 (1) | backward |" in table
    assert "of 8. Exposed under 10% for auto:" in table
    capsys.readouterr()
    one_rank.main()
    assert read_records(path) == records
    assert "ring/zigzag" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["auto", "ulysses/zigzag", "ring/contiguous"])
def test_a_played_rank_receives_what_its_plan_says(name: str) -> None:
    """Ulysses saves slots from forward to backward, which a played backward starts from too."""
    cluster = load_cluster(SMALL.cluster)
    setting = one_rank.Setting(**{**vars(SMALL), "ranks": 4, "tokens": 40, "heads": (4, 4)})
    plan = make_plan(name, setting, cluster)
    player = Player(plan, 2, CPU, make_carrier(CPU), cluster)
    for direction in one_rank.DIRECTIONS:
        played = player.play(direction, 0.0)
        assert sum(a.nbytes for a in played.arrivals) == plan.bytes(2, direction)
        assert all(a.achieved >= a.asked for a in played.arrivals)


def test_documents_keep_their_proportions() -> None:
    whole, small = mask_of("documents", one_rank.FULL), mask_of("documents", 4096)
    assert (whole.seq_len, small.seq_len) == (one_rank.FULL, 4096)
    assert small.area / 4096**2 == pytest.approx(whole.area / one_rank.FULL**2, rel=0.05)
    with pytest.raises(UserError, match="must be documents or causal"):
        mask_of("document", 64)


def test_roles_are_by_predicted_time_or_by_number() -> None:
    cluster = load_cluster(SMALL.cluster)
    plan = make_plan("ring/zigzag", SMALL, cluster)
    found = dict(ranks_to_play(plan, cluster, ["slowest", "median", "3"]))
    assert found["3"] == 3
    assert found["slowest"] != found["median"]
    with pytest.raises(UserError, match="must be slowest or median or below 16"):
        list(ranks_to_play(plan, cluster, ["16"]))
