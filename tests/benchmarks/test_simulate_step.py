"""Simulated steps and scaling studies: figures agree with each other and with exact pricing."""

from dataclasses import fields, replace

import numpy as np
import pytest

from ringattn.benchmarks.scaling_study import study
from ringattn.benchmarks.simulate_step import planned, shape_named, simulate_step
from ringattn.cost import Survey, load_cluster, price_survey
from ringattn.cost.messages import Messages
from ringattn.cost.price import straggling
from ringattn.errors import UserError

SMALL = 1 << 16


def test_figures_of_a_step_agree():
    step = simulate_step("llama3-8b", SMALL, "causal", gpus=16, cp=8, method="ring")
    total = step.seconds.total
    assert step.tokens == 2 * SMALL
    assert step.tokens_per_s == pytest.approx(step.tokens / 16 / total)
    assert step.mfu == pytest.approx(step.tflops / 989.0)
    assert 0.2 < step.mfu < 0.7
    assert sum(step.memory.peak.parts.values()) == pytest.approx(step.memory.peak.nbytes)
    assert step.fits
    longer = simulate_step("llama3-8b", 64 * SMALL, "causal", gpus=8, checkpointing="none")
    assert not longer.fits


def test_what_is_checkpointed_costs_time_and_saves_memory():
    modes = ("none", "attention", "sequence", "full")
    steps = [simulate_step("llama3-8b", SMALL, "causal", checkpointing=m) for m in modes]
    peaks = [step.memory.peak.nbytes for step in steps]
    assert peaks[0] > max(peaks[1:3])
    assert peaks[3] < min(peaks[1:3])
    seconds = [step.seconds.total for step in steps]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"cp": 3}, "cp=3"),
        ({"engine": "horovod"}, "engine"),
        ({"checkpointing": "some"}, "checkpointing"),
        ({"model": "unheard-of"}, "model"),
        ({"method": "teleport"}, "method"),
        ({"mask": "nomask"}, "nomask"),
        ({"seq_len": 1 << 40}, "seq_len"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, word):
    with pytest.raises(UserError, match=word):
        simulate_step(**({"model": "llama3-8b", "seq_len": SMALL} | arguments))


def _twice(counts: Survey) -> Survey:
    """Two groups that run the same plan, on nodes of their own, as one survey of 2P ranks."""
    world, old = counts.world, counts.messages
    parts = []
    for index in range(len(old.bounds) - 1):
        one = np.arange(old.bounds[index], old.bounds[index + 1])
        parts += [(one, 0), (one, world)]
    index = np.concatenate([one for one, _ in parts])
    shift = np.concatenate([np.full(len(one), by) for one, by in parts])
    messages = Messages(
        src=old.src[index] + shift, dst=old.dst[index] + shift, post=old.post[index],
        land=old.land[index], lane=old.lane[index], nbytes=old.nbytes[index], bounds=2 * old.bounds,
    )  # fmt: skip
    load = replace(
        counts.load,
        **{f.name: np.tile(getattr(counts.load, f.name), 2) for f in fields(counts.load)},
    )
    return replace(
        counts, world=2 * world, load=load, messages=messages, pack=np.tile(counts.pack, 2),
        unpack=np.tile(counts.unpack, 2), received=np.tile(counts.received, 2),
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["causal", "doc_causal"])
@pytest.mark.parametrize("method", ["ring", "direct", "usp"])
def test_one_groups_price_is_the_exact_price_of_several(method, mask):
    cluster = replace(load_cluster("h100_sxm"), jitter=0.0)
    plan = planned(shape_named("llama3-8b"), SMALL, mask, method, 16, cluster)
    for counts in plan.surveys:
        curve = cluster.kernel_named(None).curve(counts.direction)
        one, two = (price_survey(c, cluster, curve) for c in (counts, _twice(counts)))
        assert two.seconds == pytest.approx(one.seconds, rel=1e-12)
        np.testing.assert_allclose(two.rank_seconds, np.tile(one.rank_seconds, 2), rtol=1e-12)


def test_lateness_of_the_slowest_rank_grows_with_the_ranks():
    cluster = load_cluster("h100_sxm")
    assert straggling(cluster, 4096) > straggling(cluster, 64) > 1
    steps = [
        simulate_step("llama3-8b", SMALL, "full", gpus=gpus, cp=8, method="ring").seconds
        for gpus in (64, 4096)
    ]
    ratio = steps[1].attention_forward / steps[0].attention_forward
    assert ratio == pytest.approx(straggling(cluster, 4096) / straggling(cluster, 64))


def test_a_study_has_every_cell_and_faster_links_never_hurt():
    cells = list(
        study(
            "llama3-8b", "h100_sxm", counts=(8, 16, 32), masks=("causal",),
            methods=("ring", "ulysses"), group=16,
        )
    )  # fmt: skip
    plain = [c for c in cells if c["links"] == "as they are"]
    assert len(plain) == 2 * 3 * 2
    assert all(c["status"] == "ok" for c in cells)
    for cell in cells:
        if cell["links"] == "twice the bandwidth":
            (same,) = [
                c for c in plain
                if all(c[key] == cell[key] for key in ("kind", "gpus", "method"))
            ]  # fmt: skip
            assert cell["step_s"] <= same["step_s"] * (1 + 1e-9)
    refused = next(
        study("llama3-8b", "h100_sxm", counts=(64,), masks=("causal",), methods=("ulysses",))
    )
    assert refused["status"] == "refused"
    assert "32 query heads" in refused["reason"]


@pytest.mark.parametrize("name", ["nosuch", "h100", "", "missing.yaml"])
def test_a_cluster_that_is_not_there_is_refused(name):
    with pytest.raises(UserError):
        simulate_step("llama3-8b", 1 << 15, cluster=name)
