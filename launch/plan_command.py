"""``ringattn plan``: prices the attention of a training configuration, without running it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import ringattn as ra
from ringattn.draw import draw_mask, draw_work
from ringattn.errors import UserError
from ringattn.launch.config import Config
from ringattn.launch.config_check import check_config, resolve_model
from ringattn.launch.job import build_context, open_split
from ringattn.launch.plan_report import plan_json, plan_table
from ringattn.masks import Mask
from ringattn.planner import Comparison
from ringattn.timeline import chrome_trace, draw_timeline


def plan(
    config: Config,
    *,
    as_json: bool = False,
    cluster: str | None = None,
    pictures: str | None = None,
    trace: str | None = None,
) -> int:
    """Prints what each way to run a configuration's attention is predicted to cost.

    The mask is that of the corpus's first pack, or a causal one where the corpus is not prepared.
    Keys under ``attention`` that are not "auto" are kept to.

    Args:
        config: of a training run.
        as_json: print JSON, and notes on stderr.
        cluster: name or file; by default ``attention.cluster``, else h100_sxm where there is a GPU,
            else cpu_gloo.
        pictures: folder for mask.png, work.png and timeline.png of the choice.
        trace: file for the choice's timeline as a Chrome trace.

    Raises:
        UserError: a configuration or cluster that cannot be planned, or a path that cannot be
            written.
    """
    check_config(config)
    name = cluster or config.attention.cluster or default_cluster()
    config = replace(config, attention=replace(config.attention, cluster=name))
    mask, source, vocab_size = _mask(config)
    shape = resolve_model(config, vocab_size)
    context = build_context(config, shape, config.parallel.cp)
    comparison = context.compare(mask, exhaustive=True)
    about = (
        f"{source}; {shape.heads}:{shape.kv_heads} heads of {shape.head_dim}, {config.train.dtype},"
        f" {context.world} ranks, {context.ranks_per_node} per node; cluster {name}"
    )
    per_step = shape.layers * config.train.accumulate
    print(about, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(plan_json(comparison), indent=1))
        for refusal in comparison.refusals:
            print(f"refused: {refusal.candidate}: {refusal.reason}", file=sys.stderr)
    else:
        print("times and bytes of one layer and one pack; bytes received per rank, both directions")
        print("\n".join(plan_table(comparison)))
        total = per_step * comparison.best.seconds
        print(f"attention of a training step: {per_step} × that = {1e3 * total:.4g} ms")
    _write(context, mask, comparison, pictures, trace)
    return 0


def default_cluster() -> str:
    """Name of the shipped cluster that is nearest to this machine."""
    return "h100_sxm" if torch.cuda.is_available() else "cpu_gloo"


def _mask(config: Config) -> tuple[Mask, str, int]:
    """The mask, what it is, and the vocabulary's size."""
    path, tokens = config.data.corpora[0][0], config.data.longest
    if not (Path(path) / "meta.json").is_file():
        print(
            f"data.path={path} is not prepared: planning a causal mask of {tokens} tokens",
            file=sys.stderr,
        )
        return ra.masks.causal(tokens), f"causal mask of {tokens} tokens", 257
    packs = open_split(config, "train")
    lengths = packs.read(0, tokens).lengths
    text = f"first pack of {path}: {len(lengths)} documents in {tokens} tokens"
    return ra.masks.documents(lengths, causal=True), text, packs.vocab_size


def _write(
    context: ra.ContextParallel,
    mask: Mask,
    comparison: Comparison,
    pictures: str | None,
    trace: str | None,
) -> None:
    """Writes the pictures and the trace of the choice."""
    best = comparison.best
    try:
        if pictures is not None:
            folder = Path(pictures)
            folder.mkdir(parents=True, exist_ok=True)
            draw_mask(mask, best.layout, folder / "mask.png")
            draw_work(context.plan(mask), folder / "work.png")
            title = f"predicted: {best.candidate}, {context.world} ranks"
            draw_timeline(best.priced, folder / "timeline.png", title=title)
            print(f"wrote mask.png, work.png, timeline.png in {folder}", file=sys.stderr)
        if trace is not None:
            Path(trace).write_text(json.dumps(chrome_trace(best.priced)), encoding="utf-8")
            print(f"wrote {trace}", file=sys.stderr)
    except OSError as error:
        raise UserError(
            f"{error.filename}", f"cannot be written ({error.strerror})", "name another path"
        ) from None
