"""Trains a small model at 2,048 tokens, extends it to 16,384, and shows how far it can look back.

    python docs/examples/extend_context/extend_context.py

Everything goes to data/extend_context and runs/extend_context below the current folder; results go
to --out. What exists already is not made again, so that an interrupted run goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringattn.launch.context_plot import draw_needles
from ringattn.launch.main import main

HERE = Path(__file__).parent
# Greek and Cyrillic letters, which the text hardly has: two bytes, of which one tells them apart.
VALUES = "".join(map(chr, [*range(0x3B1, 0x3C9), *range(0x410, 0x450)]))
DATA, RUNS = Path("data/extend_context"), Path("runs/extend_context")
# One key, a pass key, and values whose characters are found nowhere else: looking that up is
# learned in minutes by a model of this size, telling keys apart is not.
NEEDLE = [
    "--statement", "\n@{key}={value}\n", "--question", "\n?{key}={value}", "--keys", "K",
    "--key-length", "1", "--values", VALUES, "--value-length", "1",
]  # fmt: skip
OFTEN = ["--every", "48"]
CORPORA = {
    "near": ["--tokens", "1500000", "--shortest", "20", "--longest", "40", "--every", "3"],
    # Many questions for one statement: they teach most of it.
    "many": ["--tokens", "2500000", "--shortest", "48", "--longest", "2048", "--every", "24"],
    "far": ["--tokens", "4000000", "--shortest", "1024", "--longest", "2048", "--every", "600"],
    "many_long": ["--tokens", "2000000", "--shortest", "6144", "--longest", "24576", *OFTEN],
    "long": ["--tokens", "3000000", "--shortest", "6144", "--longest", "24576", "--every", "4000"],
}
LENGTHS = "1024,2048,4096,8192,16384"
SCALED = ["model.rope_scaling=yarn", "model.rope_factor=16", "model.rope_original_seq_len=2048"]
TESTS = {
    "pretrained": ("trained at 2K", "pretrained", []),
    "scaled": ("YaRN × 16, not trained further", "pretrained", SCALED),
    "extended": ("YaRN × 16, extended to 16K", "extended", []),
}


def run(*words: str) -> None:
    """One ringattn command."""
    print(
        "$ ringattn", " ".join(repr(w) if " " in w or "\n" in w else w for w in words), flush=True
    )
    code = main(words)
    if code:
        raise SystemExit(code)


def make_corpora() -> None:
    """Real text, and three corpora of needles in it."""
    if not (DATA / "text" / "meta.json").is_file():
        run("prepare", "stdlib", "--out", str(DATA / "text"))
    for name, options in CORPORA.items():
        if not (DATA / name / "meta.json").is_file():
            run("needles", str(DATA / "text"), "--out", str(DATA / name), *options, *NEEDLE)


def evaluate(name: str, samples: int, out: Path) -> dict[str, Any]:
    """Tests one of `TESTS` and keeps its numbers."""
    _, folder, overrides = TESTS[name]
    where = RUNS / "tests" / name
    run(
        "evaluate", str(RUNS / folder), *overrides, "--lengths", LENGTHS,
        "--text", str(DATA / "text"), "--needles", str(DATA / "near"), "--depths", "6",
        "--samples", str(samples), "--distractors", "0", "--out", str(where),
    )  # fmt: skip
    result = json.loads((where / "context.json").read_text(encoding="utf-8"))
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Heat maps side by side, and the loss of the same tokens against the context given."""
    figure = Figure(figsize=(16, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results) + 1)
    for axes, (name, result) in zip(panels, results.items(), strict=False):
        draw_needles(axes, result["needles"])
        axes.set_title(f"needles retrieved (%)\n{TESTS[name][0]}")
        context = result["context"]
        panels[-1].plot(context["context"], context["loss"], marker="o", label=TESTS[name][0])
    panels[-1].set_xscale("log", base=2)
    panels[-1].set_xlabel("context (tokens)")
    panels[-1].set_ylabel("loss (nats per byte)")
    panels[-1].set_title("real text: the same bytes\nfrom more and more context")
    panels[-1].grid(alpha=0.3)
    panels[-1].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/extend_context/results"))
    parser.add_argument("--samples", type=int, default=4, help="needles per length and depth")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_corpora()
    for name in ("lookup", "pretrain", "extend"):
        run("train", str(HERE / f"{name}.yaml"))
    found = {name: evaluate(name, arguments.samples, arguments.out) for name in TESTS}
    plot(found, arguments.out / "extension.png")
    print(f"wrote {arguments.out / 'extension.png'}")
