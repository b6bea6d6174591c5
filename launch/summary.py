"""How a run ended: held-out loss beside simple baselines, generated text, where things are."""

import json
import math
from pathlib import Path
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.job import Job
from ringattn.launch.metrics import EvalMetrics
from ringattn.launch.model import Transformer
from ringattn.launch.packing import PackedDataset
from ringattn.launch.plot import plot_loss
from ringattn.launch.sample import generate
from ringattn.launch.write_policy import WritePolicy

_PROMPT_TOKENS, _SAMPLE_TOKENS = 64, 200


def write_summary(
    job: Job,
    model: Transformer | None,
    evaluation: EvalMetrics | None,
    policy: WritePolicy | None = None,
) -> None:
    """Writes loss.png and summary.json and prints the summary on stdout; for one rank.

    Args:
        job: the finished run.
        model: its final weights; None where no rank holds all of them: then there is no text.
        evaluation: on the held-out split, None without one.
        policy: what a file that cannot be written means; what is printed is printed anyway.
    """
    folder = Path(job.config.run.dir)
    # A mixture's tokens are not those that one corpus's entropy was measured on.
    entropy = job.train.meta.entropy if len(job.config.data.corpora) == 1 else {}
    losses: dict[str, Any] = {}
    if evaluation is not None:
        losses["held-out loss"] = evaluation.loss
        for name in ("unigram", "bigram"):
            value = entropy.get(name)
            if value is not None:
                losses[f"{name} entropy"] = value["nats"]
    prompt, text = ("", "") if model is None else _sample(job, model)
    lines = [f"finished {job.config.train.steps} steps"]
    lines += [
        f"  {name:<16}{v:8.4f} nats {v / math.log(2):8.4f} bits" for name, v in losses.items()
    ]
    lines += _sample_lines(prompt, text)
    if model is None:
        lines.append(f"  {'a sample':<16}ringattn sample {folder}")
    summary = {
        "step": job.config.train.steps,
        "nats": losses,
        "sample": {"prompt": prompt, "text": text},
    }
    failure = None
    try:
        content = json.dumps(summary, indent=1) + "\n"
        (folder / "summary.json").write_text(content, encoding="utf-8")
        plot_loss(folder, job.config.run.name or folder.name, entropy)
    except OSError as error:
        failure = error
    lines.append(f"written to {folder}")
    for name, what in _CONTENTS:
        if (folder / name).exists():
            lines.append(f"  {name:<16}{what}")
    if saved := find_checkpoints(folder):
        lines.append(f"  {'checkpoints':<16}newest {saved[-1].name}")
    print("\n".join(lines), flush=True)
    if failure is not None:
        (policy or WritePolicy()).failed(f"summary in {folder}", failure)


_CONTENTS = (
    ("config.yaml", "the resolved configuration"),
    ("metrics.jsonl", "one object per step"),
    ("eval.jsonl", "one object per evaluation"),
    ("events.jsonl", "steps that went wrong, slow ranks, restarts"),
    ("loss.png", "the loss curve"),
    ("summary.json", "what is printed here"),
    ("tensorboard", "the same for TensorBoard"),
    ("profile", "traces, one per rank"),
)


def _sample(job: Job, model: Transformer) -> tuple[str, str]:
    """Text continued from the start of the held-out split (else of the training split)."""
    source: PackedDataset = job.heldout or job.train
    tokenizer = source.tokenizer
    pack = source.pack(0)
    prompt = tokenizer.decode(pack.tokens[: min(_PROMPT_TOKENS, pack.lengths[0])])
    try:
        return prompt, generate(
            model, tokenizer, prompt, tokens=_SAMPLE_TOKENS, seed=job.config.seed
        )
    except UserError:
        # A first document without text gives no prompt; the sample is an extra.
        return prompt, ""


def _sample_lines(prompt: str, text: str) -> list[str]:
    if not text:
        return []
    shown = [f"  | {line}" for line in (prompt + "⟫" + text).splitlines()]
    return ["a sample (the model's own text follows ⟫):", *shown]
