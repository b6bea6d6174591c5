"""Calibration: published rows become plans with the right units, and a fit finds known figures."""

from dataclasses import replace

import numpy as np
import pytest

from ringattn.benchmarks import calibration_fit as fitting
from ringattn.benchmarks import calibration_plans as plans
from ringattn.benchmarks import calibration_rows as published
from ringattn.cost import load_cluster
from ringattn.errors import UserError
from ringattn.schedule import Lane

FIELDS = (
    "source,hardware,gpus,model,heads_q,heads_kv,head_dim,seq_len,mask,method,metric,value,unit"
)  # fmt: skip
METHODS = (
    "ulysses", "ring", "allgather", "usp", "loongtrain-doublering", "hybrid-cp", "magi-a2av",
    "magi-native",
)  # fmt: skip


def table(tmp_path, *rows: str):
    """A table of published results with these rows."""
    path = tmp_path / "table.csv"
    path.write_text("\n".join([FIELDS, *rows]) + "\n")
    return path


def row(method: str, mask: str = "causal", gpus: int = 8, value: float = 1.0) -> published.Row:
    """An H100 row of 1,024 tokens per rank, forward and backward."""
    return published.Row(
        source="MagiAttention", hardware="H100-80GB", gpus=gpus, heads=(64, 8), head_dim=128,
        seq_len=1024 * gpus, mask=mask, method=method, directions=("forward", "backward"),
        tflops=value,
    )  # fmt: skip


def test_speeds_times_and_rates_of_one_measurement_agree(tmp_path):
    # Causal, 4,096 tokens: 4,096 x 4,097 / 2 pairs x 64 heads x 512 FLOPs, and 2.5 times backward.
    flops = 4096 * 4097 / 2 * 64 * 512
    head = "s,H100-80GB,1,attention-only,64,8,128,4096,causal,kernel-fa3"
    rows = published.read_rows(
        table(
            tmp_path,
            f"{head},fwd_tflops_per_gpu,{flops / 1e12},TFLOP/s/GPU",
            f"{head},fwd_time,1000,ms",
            f"{head},fwdbwd_time,3.5,s",
            f"{head},fwdbwd_rate,{1 / 3.5},iter/s",
            f"{head},oom,fail,verdict",
            "s,H100-80GB,1,llama-7b,64,8,128,4096,causal,kernel-fa3,fwd_time,1000,ms",
        )
    )
    assert len(rows) == 4
    assert [r.tflops for r in rows] == pytest.approx([flops / 1e12] * 4)
    assert [len(r.directions) for r in rows] == [1, 1, 2, 2]
    with pytest.raises(UserError, match="no attention-only rows"):
        published.read_rows(table(tmp_path))


@pytest.mark.parametrize("mask", ["full", "causal", "doc_full", "doc_causal"])
@pytest.mark.parametrize("method", METHODS)
def test_imitations_compute_every_pair_for_every_head(method, mask):
    wanted = row(method, mask, gpus=16)
    for built in published.masks_of(wanted)[:1]:
        for schedule in plans.schedules_of(wanted, built):
            tasks = schedule.tasks
            assert (tasks["area"] * (tasks["h1"] - tasks["h0"])).sum() == built.area * 64


def test_sampled_documents_fill_the_pack_and_stay_below_a_quarter():
    for seed in range(5):
        lengths = published.sampled_lengths(1 << 18, seed)
        assert lengths.sum() == 1 << 18
        assert lengths.min() > 0
        assert lengths.max() <= 1 << 16
        np.testing.assert_array_equal(lengths, published.sampled_lengths(1 << 18, seed))


def test_rows_sent_once_per_node_keep_their_number():
    wanted = replace(row("magi-a2av", gpus=16), seq_len=8192 * 16)
    (mask,) = published.masks_of(wanted)
    for schedule in plans.schedules_of(wanted, mask):
        shared = plans.once_per_node(schedule, 8)
        assert shared.moves["rows"].sum() == schedule.moves["rows"].sum()
        inter = [s.moves["rows"][s.moves["lane"] == Lane.INTER].sum() for s in (schedule, shared)]
        # Eight ranks of a node need nearly all rows, in one of two stages each.
        assert inter[0] / 8 <= inter[1] < inter[0] / 3


def test_a_fit_finds_the_figures_that_made_the_rows():
    start = load_cluster("h100_sxm")
    cases = [
        fitting.case_of(row(method, mask), start)
        for method in ("ulysses", "ring", "magi-a2av")
        for mask in ("full", "causal", "doc_causal")
    ]
    made = [
        fitting.Case(row(c.row.method, c.row.mask, value=fitting.simulated(c, start)), c.surveys)
        for c in cases
    ]
    assert np.abs(fitting.errors(made, start)).max() < 1e-9
    paths = ["intra.gbs", "kernels.fa3_unfused.forward.tflops", "kernels.ffa.backward.tflops"]
    wrong = fitting.neutral(start, paths)
    before = np.abs(fitting.errors(made, wrong))
    after = np.abs(fitting.errors(made, fitting.fit(made, wrong, paths)))
    assert before.max() > 0.02
    assert after.max() < 0.02


def test_folds_keep_runs_together():
    rows = [row(method, mask) for method in METHODS for mask in ("full", "causal")] * 2
    folds = fitting.folds_of(rows, 3)
    assert set(folds) == {0, 1, 2}
    np.testing.assert_array_equal(folds[: len(rows) // 2], folds[len(rows) // 2 :])
