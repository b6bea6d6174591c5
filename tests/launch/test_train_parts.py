"""The trainer's parts: loss in chunks, gradient buckets, mesh, metric files, progress line."""

import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ringattn.errors import UserError
from ringattn.kernels import linear_loss
from ringattn.launch.config import Config, DataConfig, RunConfig
from ringattn.launch.metrics import METRICS_FILE, MetricsWriter, StepMetrics, read_lines
from ringattn.launch.model import Transformer, init_weights
from ringattn.launch.model_config import model_config
from ringattn.launch.packing import IGNORE
from ringattn.launch.progress import ProgressLine, format_degrees, format_seconds
from ringattn.launch.session import Placement, place_ranks
from ringattn.parallel.grads import GradientBuckets
from ringattn.parallel.mesh import build_mesh
from tests.ranks import run_ranks


def metrics_of(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, loss=1.0 / step, tokens=8, step_s=0.5, tokens_per_s=16.0, grad_norm=1.0, lr=0.1,
        mfu=None,
    )  # fmt: skip


def loss_and_gradients(model: Transformer, labels: torch.Tensor) -> list[torch.Tensor]:
    hidden = torch.linspace(-1, 1, labels.numel() * model.cfg.dim).view(1, -1, model.cfg.dim)
    hidden.requires_grad_()
    value = model.lm_head(hidden, labels)
    gradients = torch.autograd.grad(value, [hidden, model.lm_head.weight])
    return [value.detach(), *gradients]


def test_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(model_config("debug", dim=16, layers=1))
    init_weights(model, 0)
    labels = torch.arange(30)[None] % 7
    labels[0, ::4] = IGNORE
    whole = loss_and_gradients(model, labels)
    monkeypatch.setattr(linear_loss, "LOGITS", 257 * 7)
    for expected, got in zip(whole, loss_and_gradients(model, labels), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("labels", [torch.empty(1, 0, dtype=torch.int64), torch.tensor([[IGNORE]])])
def test_loss_of_nothing_is_zero_and_differentiable(labels: torch.Tensor) -> None:
    model = Transformer(model_config("debug", dim=16, layers=1))
    init_weights(model, 0)
    for tensor in loss_and_gradients(model, labels):
        assert not tensor.isnan().any()
        assert not tensor.any()


def _bucket_sums(rank: int, world: int, group: Any) -> tuple[list[torch.Tensor], float, int]:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (40,), (5,), (1,))]
    buckets = GradientBuckets(parameters, group, bucket_bytes=4 * 12)
    for _ in range(2):  # two micro-batches add up
        sum((p * (rank + 1)).sum() for p in parameters).backward()  # type: ignore[union-attr]
    buckets.reduce()
    norm = float(buckets.clip(1.0))
    return [p.grad.clone() for p in parameters if p.grad is not None], norm, len(buckets.buckets)


def test_gradients_are_summed_over_micro_batches_and_ranks() -> None:
    for gradients, norm, count in run_ranks(3, _bucket_sums):
        assert count == 3  # 6 | 40 | 5 + 1
        assert norm == pytest.approx(12 * 52**0.5)  # 2 × (1 + 2 + 3), over 52 elements
        for gradient in gradients:
            torch.testing.assert_close(gradient, torch.full_like(gradient, 52**-0.5))


def _lost_gradient(rank: int, world: int, group: Any) -> None:
    parameter = nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([parameter], group)
    parameter.grad = torch.ones(3)
    buckets.reduce()


def test_a_gradient_outside_its_bucket_is_noticed() -> None:
    with pytest.raises(AssertionError, match="left its bucket"):
        run_ranks(1, _lost_gradient)


def _mesh_places(rank: int, world: int, group: Any) -> tuple[int, int, list[int], float]:
    import torch.distributed as dist

    mesh = build_mesh("cpu", dp=2, cp=2, timeout=timedelta(seconds=17))
    cp_group = mesh.cp_mesh.get_group()
    backend: Any = cp_group._get_backend(torch.device("cpu"))
    seconds = backend.options._timeout.total_seconds()
    assert mesh.rank == rank
    return mesh.dp_rank, mesh.cp_rank, dist.get_process_group_ranks(cp_group), seconds


def test_cp_ranks_are_neighbours_and_wait_as_long_as_told() -> None:
    assert run_ranks(4, _mesh_places) == [
        (0, 0, [0, 1], 17.0), (0, 1, [0, 1], 17.0), (1, 0, [2, 3], 17.0), (1, 1, [2, 3], 17.0)
    ]  # fmt: skip


def test_metric_lines_after_the_resumed_step_are_removed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write_step(metrics_of(step))
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, 3)
    writer.write_step(metrics_of(4))
    writer.close()
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert read_lines(tmp_path / "none.jsonl") == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_line() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        progress = ProgressLine(0, 25, 10, stream)
        for step in range(1, 26):
            progress.show(metrics_of(step))
        progress.note("a note")
    shown = [line.split()[1] for line in plain.getvalue().splitlines() if "tokens/s" in line]
    assert shown == ["1/25", "10/25", "20/25", "25/25"]
    assert terminal.getvalue().count("\r") == 25
    assert terminal.getvalue().endswith("\na note\n")
    assert format_degrees([2, 8, 2, 2]) == "1x8+3x2"
    assert [format_seconds(s) for s in (7.4, 185, 7620)] == ["7s", "3m05s", "2h07m"]


CPU, OWN = Placement(device_type="cpu"), Placement(device_type="cuda", gpus=4)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", 0, CPU),
        ("auto", 4, OWN),
        ("auto", 1, Placement(device_type="cuda", gpus=1, shared=True)),
        ("cpu", 4, CPU),
        ("cuda", 4, OWN),
        ("cuda", 3, "needs one GPU per rank: 4 ranks, 3 GPUs on this host"),
        ("cuda_shared", 3, Placement(device_type="cuda", gpus=3, shared=True)),
        ("cuda_shared", 4, Placement(device_type="cuda", gpus=4, shared=True)),
        ("cuda_shared", 0, "there is no GPU on this host"),
    ],
)
def test_what_four_ranks_of_a_host_run_on(
    device: Any, gpus: int, expected: Placement | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = Config(data=DataConfig(path="x", seq_len=8), run=RunConfig(device=device))
    if isinstance(expected, Placement):
        assert place_ranks(config, 4) == expected
        return
    with pytest.raises(UserError, match=expected):
        place_ranks(config, 4)
