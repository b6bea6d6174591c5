"""``ringattn evaluate``: tests of a run's newest checkpoint on long contexts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.checkpoint import load_tensors, read_state
from ringattn.launch.config import Config
from ringattn.launch.config_check import check_config, resolve_model
from ringattn.launch.config_load import load_config
from ringattn.launch.context_plot import plot_context
from ringattn.launch.context_tests import (
    Tester,
    loss_by_context,
    loss_by_position,
    retrieve_needles,
)
from ringattn.launch.initial_weights import WeightsChoice, choose_weights, sound_weights
from ringattn.launch.job import build_context, check_attention
from ringattn.launch.launchers import Launcher
from ringattn.launch.model import Transformer
from ringattn.launch.model_config import ModelConfig
from ringattn.launch.needle_corpus import needle_format
from ringattn.launch.needles import NeedleFormat
from ringattn.launch.packing import PackedDataset, check_one_tokenizer
from ringattn.launch.peers import default_peers
from ringattn.launch.session import Session, place_ranks
from ringattn.launch.token_scores import Scorer
from ringattn.launch.train import on_ranks
from ringattn.parallel.mesh import build_mesh

TESTS = ("position", "context", "needles")
_SHORTEST = 1024


@dataclass(frozen=True, kw_only=True)
class ContextRequest:
    """What ``ringattn evaluate`` is asked for.

    Attributes:
        run: run folder, or one of its checkpoints.
        tests: of `TESTS`.
        lengths: context lengths; None: powers of two from 1,024 to ``data.seq_len``.
        text: corpus of the real text; None: the run's first one. needles: corpus whose needle
            format is used; None: `NeedleFormat()`.
        depths, samples, distractors, seed: as in `context_tests.retrieve_needles`; `samples` is
            also a quarter of the sequences that the other tests read.
        targets: as in `context_tests.loss_by_context`.
        out: folder to write; None: ``context`` in the run folder.
    """

    run: str
    tests: tuple[str, ...] = TESTS
    lengths: tuple[int, ...] | None = None
    text: str | None = None
    needles: str | None = None
    depths: int = 8
    samples: int = 4
    distractors: int = 4
    targets: int = 256
    seed: int = 0
    out: str | None = None


@dataclass(frozen=True)
class _Opened:
    """A checked request: what to test, on what, and where it is written."""

    weights: WeightsChoice
    shape: ModelConfig
    text: PackedDataset
    fmt: NeedleFormat
    lengths: tuple[int, ...]
    out: Path


def evaluate_run(
    request: ContextRequest, overrides: Sequence[str] = (), launcher: Launcher = "auto"
) -> int:
    """Tests a run's checkpoint; rank 0 writes context.json and pictures and prints a summary.

    Runs on dp × cp ranks like training: contexts are sharded over cp, sequences spread over dp.
    Every rank holds the whole model.

    Args:
        request: the tests.
        overrides: ``key=value`` changes to the run's configuration, RoPE scaling and ranks among
            them.
        launcher: as in `discover_ranks`.

    Returns:
        The exit code.

    Raises:
        UserError: no run, or a configuration that cannot be read.
    """
    folder = _run_folder(Path(request.run))
    config = load_config(folder / "config.yaml", overrides)
    body = partial(_test_on_rank, request)

    def check() -> None:
        _open(request, config, config.world)

    return on_ranks(config, body, check, launcher)


def _run_folder(path: Path) -> Path:
    """The run folder of a run or of one of its checkpoints."""
    for folder in (path, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"run {path}", "holds no config.yaml", "name the run.dir of a run")


def _open(request: ContextRequest, config: Config, local_world: int) -> _Opened:
    """Checks a request against run, corpora and checkpoint; starts nothing, writes nothing.

    `local_world` ranks share the GPUs of this host.
    """
    check_config(config)
    unknown = set(request.tests) - set(TESTS)
    if unknown:
        raise UserError(f"--tests {min(unknown)}", "is no test", f"use {', '.join(TESTS)}")
    for name, least in (("depths", 1), ("samples", 1), ("targets", 1), ("distractors", 0)):
        if getattr(request, name) < least:
            raise UserError(
                f"--{name} {getattr(request, name)}", f"must be at least {least}", f"use {least}"
            )
    lengths = request.lengths or _powers(config.data.seq_len)
    if min(lengths) < max(2, config.parallel.cp):
        raise UserError(f"--lengths {min(lengths)}", "is too short", "use e.g. 1024,4096")
    path = request.text or config.data.corpora[0][0]
    check_one_tokenizer([Path(config.data.corpora[0][0]), Path(path)])
    text = PackedDataset(path, "heldout", max(lengths))
    folder = _run_folder(Path(request.run))
    shape = resolve_model(config, text.vocab_size)
    device_type = place_ranks(config, local_world).device_type
    check_attention(config, shape, device_type, [max(lengths)])
    return _Opened(
        weights=choose_weights(request.run, shape, f"run {request.run}"),
        shape=shape,
        text=text,
        fmt=needle_format(request.needles) if request.needles else NeedleFormat(),
        lengths=tuple(sorted(lengths)),
        out=Path(request.out) if request.out else folder / "context",
    )


def _powers(longest: int) -> tuple[int, ...]:
    """1,024 and its doubles up to `longest`, which is the last."""
    found = [_SHORTEST << i for i in range(40) if _SHORTEST << i < longest]
    return (*found, longest)


def _test_on_rank(request: ContextRequest, config: Config, session: Session) -> None:
    opened = _open(request, config, session.sharers)
    parallel = config.parallel
    mesh = build_mesh(session.device.type, dp=parallel.dp, cp=parallel.cp, timeout=session.timeout)
    model = Transformer(opened.shape).eval()
    weights = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    path = sound_weights(opened.weights, default_peers())
    load_tensors(path, weights, verified=True)
    model.to(session.device)
    staged = "cuda" if session.shared else None
    cp = build_context(config, opened.shape, mesh.cp_mesh, staged, session.topology)
    scorer = Scorer(model, cp, session.device, bf16=config.train.dtype == "bf16")
    tester = Tester(scorer, mesh, opened.text, session.device)
    result = _run_tests(tester, request, opened)
    if session.is_main:
        scaling = opened.shape.rope_scaling
        about = {
            "run": config.run.name or Path(request.run).name,
            "step": read_state(path).step,
            "rope_scaling": asdict(scaling) if scaling else None,
            "text": str(opened.text.path),
            "needle_format": asdict(opened.fmt),
            "seed": request.seed,
        }
        _write(opened.out, {**about, **result})
    session.barrier()


def _run_tests(tester: Tester, request: ContextRequest, opened: _Opened) -> dict[str, Any]:
    result: dict[str, Any] = {}
    sequences = 4 * request.samples
    if "position" in request.tests:
        result["position"] = loss_by_position(tester, max(opened.lengths), sequences)
    if "context" in request.tests:
        result["context"] = loss_by_context(tester, opened.lengths, request.targets, sequences)
    if "needles" in request.tests:
        result["needles"] = retrieve_needles(
            tester,
            opened.fmt,
            opened.lengths,
            request.depths,
            request.samples,
            distractors=request.distractors,
            seed=request.seed,
        )
    return result


def _write(out: Path, result: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1) + "\n"
        (out / "context.json").write_text(text, encoding="utf-8")
        plot_context(result, out)
    except OSError as error:
        raise UserError(
            f"{out}", f"cannot be written ({error.strerror})", "name another --out"
        ) from None
    print("\n".join(_summary(result)), flush=True)
    print(f"written to {out}", flush=True)


def _summary(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if "position" in result:
        lines.append("context at least    loss (nats)     tokens")
        rows = zip(*(result["position"][k] for k in ("context", "loss", "tokens")), strict=True)
        lines += [f"{c:>16,} {loss:>14.4f} {n:>10,}" for c, loss, n in rows if loss is not None]
    if "context" in result:
        lines.append("context             loss (nats)  perplexity")
        rows = zip(*(result["context"][k] for k in ("context", "loss", "perplexity")), strict=True)
        lines += [f"{c:>16,} {loss:>14.4f} {p:>11.2f}" for c, loss, p in rows]
    if "needles" in result:
        needles = result["needles"]
        lines.append("context             needles retrieved")
        for length, row in zip(needles["lengths"], needles["retrieved"], strict=True):
            lines.append(f"{length:>16,} {100 * sum(row) / len(row):>13.0f} %")
    return lines
