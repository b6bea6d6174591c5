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
from ringattn.launch.feed import layer_masks
from ringattn.launch.fit import FitModel
from ringattn.launch.fit_report import fit_json, fit_table, recipe_comment
from ringattn.launch.job import build_context, open_split
from ringattn.launch.model_config import MODEL_SIZES
from ringattn.launch.packing import PackedDataset
from ringattn.launch.plan_stack import (
    LayerKind,
    degrees_json,
    degrees_line,
    kinds_json,
    kinds_table,
    layer_kinds,
)
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
    Layers with windows are priced by mask, on the layout of the whole stack; with
    ``parallel.min_cp`` the first step's packs are scheduled too.
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
    name = cluster or config.attention.cluster or default_cluster()
    config = replace(config, attention=replace(config.attention, cluster=name))
    check_config(config)
    packs = None if comment else _packs(config)
    lengths, source = _lengths(config, packs)
    shape = resolve_model(config, packs.vocab_size if packs else _vocabulary(config))
    context = build_context(config, shape, config.parallel.cp)
    if fit or comment:
        plans = context.plans(layer_masks(lengths, shape.windows))
        _print_fit(FitModel(config, shape, plans), source, as_json=as_json, comment=comment)
        return 0
    kinds = layer_kinds(context, lengths, shape.windows)
    degrees = None
    if packs is not None and config.parallel.min_cp is not None:
        degrees = degrees_json(config, shape, packs)
    about = (
        f"{source}; {shape.heads}:{shape.kv_heads} heads of {shape.head_dim}, {config.train.dtype},"
        f" {context.world} ranks, {context.ranks_per_node} per node; cluster {name}"
    )
    print(about, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        found = kinds_json(kinds) | ({"step": degrees} if degrees else {})
        print(json.dumps(found, indent=1))
        for kind in kinds:
            for refusal in kind.comparison.refusals:
                print(f"refused: {refusal.candidate}: {refusal.reason}", file=sys.stderr)
    else:
        print("times and bytes of one layer and one pack; bytes received per rank, both directions")
        print("\n".join(kinds_table(kinds, config.train.accumulate)))
        if degrees is not None:
            print(degrees_line(degrees, config.packs_per_step))
    _write(context, kinds[0], pictures, trace)
    return 0


def _print_fit(model: FitModel, source: str, *, as_json: bool, comment: bool) -> None:
    """The prediction for a training step with the attention that the planner chooses."""
    found, cluster = model.fit(others=not comment), str(model.config.attention.cluster)
    if comment:
        print("\n".join(recipe_comment(found, model, cluster)))
        return
    about = f"{source}; {model.config.world} ranks, {model.methods}; cluster {cluster}"
    print(about, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(fit_json(found, model), indent=1))
    else:
        print("\n".join(fit_table(found, model)))


def default_cluster() -> str:
    """Name of the shipped cluster that is nearest to this machine."""
    return "h100_sxm" if torch.cuda.is_available() else "cpu_gloo"


def _packs(config: Config) -> PackedDataset | None:
    """The corpus's packs; None where it is not prepared."""
    if not all((Path(path) / "meta.json").is_file() for path, _ in config.data.corpora):
        return None
    return open_split(config, "train")


def _lengths(config: Config, packs: PackedDataset | None) -> tuple[list[int], str]:
    """Document lengths of the pack to plan, and what it is."""
    path, tokens = config.data.corpora[0][0], config.data.longest
    if packs is None:
        print(
            f"data.path={path} is not prepared: planning a causal mask of {tokens} tokens",
            file=sys.stderr,
        )
        return [tokens], f"causal mask of {tokens} tokens"
    lengths = packs.read(0, tokens).lengths
    text = f"first pack of {path}: {len(lengths)} documents in {tokens} tokens"
    return lengths, text


def _vocabulary(config: Config) -> int:
    """Classes where there is no corpus: those of the named size, or of the checkpoint."""
    return 1 if config.model.hf is not None else MODEL_SIZES[config.model.size].vocab_size


def _write(
    context: ra.ContextParallel,
    kind: LayerKind,
    pictures: str | None,
    trace: str | None,
) -> None:
    """Writes the pictures and the trace of the choice."""
    best = kind.comparison.best
    try:
        if pictures is not None:
            folder = Path(pictures)
            folder.mkdir(parents=True, exist_ok=True)
            draw_mask(kind.mask, best.layout, folder / "mask.png")
            draw_work(kind.plan, folder / "work.png")
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
