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
from ringattn.launch.corpus import load_meta
from ringattn.launch.fit import FitModel
from ringattn.launch.fit_report import fit_json, fit_table, recipe_comment
from ringattn.launch.job import build_context
from ringattn.launch.model_config import MODEL_SIZES, ModelConfig
from ringattn.launch.packing import PackedDataset
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
    fit: bool = False,
    comment: bool = False,
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
        fit: predict the memory and the time of a training step instead.
        comment: print the comment that heads a shipped recipe instead.

    Raises:
        UserError: a configuration or cluster that cannot be planned, or a path that cannot be
            written.
    """
    check_config(config)
    name = cluster or config.attention.cluster or default_cluster()
    config = replace(config, attention=replace(config.attention, cluster=name))
    mask, source, vocab_size = _mask(config, comment=comment)
    shape = resolve_model(config, vocab_size)
    context = build_context(config, shape, config.parallel.cp)
    if fit or comment:
        _print_fit(config, shape, context, mask, source, as_json=as_json, comment=comment)
        return 0
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


def _print_fit(
    config: Config,
    shape: ModelConfig,
    context: ra.ContextParallel,
    mask: Mask,
    source: str,
    *,
    as_json: bool,
    comment: bool,
) -> None:
    """The prediction for a training step with the attention that the planner chooses."""
    assert context.cluster is not None
    quote = context.compare(mask).best
    model = FitModel(config, shape, context.cluster, context.plan_of(mask, quote), quote)
    found, name = model.fit(others=not comment), str(config.attention.cluster)
    if comment:
        print("\n".join(recipe_comment(found, model, quote, name)))
        return
    about = f"{source}; {config.world} ranks, {quote.candidate}; cluster {name}"
    print(about, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(fit_json(found, model), indent=1))
    else:
        print("\n".join(fit_table(found, model)))


def default_cluster() -> str:
    """Name of the shipped cluster that is nearest to this machine."""
    return "h100_sxm" if torch.cuda.is_available() else "cpu_gloo"


def _mask(config: Config, *, comment: bool = False) -> tuple[Mask, str, int]:
    """The mask, what it is, and the vocabulary's size; a recipe's comment needs no corpus."""
    data = config.data
    if comment or not (Path(data.path) / "meta.json").is_file():
        if not comment:
            print(
                f"data.path={data.path} is not prepared: planning a causal mask of {data.seq_len} "
                "tokens",
                file=sys.stderr,
            )
        about = f"causal mask of {data.seq_len} tokens"
        return ra.masks.causal(data.seq_len), about, _vocabulary(config)
    packs = PackedDataset(
        data.path, "train", data.seq_len, config.seed, max_document=data.max_document
    )
    lengths = packs.pack(0).lengths
    text = f"first pack of {data.path}: {len(lengths)} documents in {data.seq_len} tokens"
    return ra.masks.documents(lengths, causal=True), text, load_meta(data.path).vocab_size


def _vocabulary(config: Config) -> int:
    """Classes where there is no corpus: those of the named size, or of the checkpoint."""
    return 1 if config.model.hf is not None else MODEL_SIZES[config.model.size].vocab_size


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
