"""The command ``ringattn``. Also ``python -m ringattn.launch``.

ringattn prepare SOURCE --out DIR
ringattn train CONFIG [key=value ...]
ringattn plan CONFIG [key=value ...]
ringattn sample RUN --prompt TEXT
ringattn evaluate RUN [key=value ...]
ringattn needles CORPUS --out DIR
ringattn doctor [--out cluster.yaml]
ringattn bench SUITE [--settings NAME] [--out DIR]
ringattn export RUN --out FOLDER
ringattn report RESULTS ... [--out report.html]
"""

import argparse
import importlib.resources
import sys
from collections.abc import Sequence
from pathlib import Path

from ringattn.errors import UserError
from ringattn.launch.failure import report_line, run_reporting
from ringattn.launch.main_bench import add_bench
from ringattn.launch.main_context import add_evaluate, add_launcher, add_needles
from ringattn.launch.main_doctor import add_doctor
from ringattn.launch.main_report import add_report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 for a mistake in arguments, configuration or input, 1 for a fault.
    """
    arguments = _parse(argv)
    code = 0

    def body() -> None:
        nonlocal code
        code = arguments.run(arguments)

    return run_reporting(body) or code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before and after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        arguments.overrides += late
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ringattn", description="Trains language models on sequences sharded over ranks."
    )
    # DeepSpeed's launcher hands it to whatever it starts, and sets LOCAL_RANK too.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_train(commands)
    _add_plan(commands)
    _add_sample(commands)
    add_evaluate(commands)
    add_needles(commands)
    add_doctor(commands)
    add_bench(commands)
    _add_export(commands)
    add_report(commands)
    return parser


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = commands.add_parser("prepare", help="turn text into a corpus of tokens")
    prepare.add_argument(
        "source", metavar="SOURCE",
        help="a text, .jsonl or .parquet file, a folder of those, or stdlib (the Python standard "
        "library's own source)",
    )  # fmt: skip
    prepare.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new")
    prepare.add_argument(
        "--tokenizer", default="bytes", metavar="NAME",
        help="bytes (default), or a Hugging Face tokenizer folder",
    )  # fmt: skip
    prepare.add_argument(
        "--holdout", type=float, default=0.02, metavar="SHARE",
        help="share of documents held out for evaluation (default 0.02)",
    )  # fmt: skip
    prepare.add_argument(
        "--separator", metavar="TEXT", help="cut text files into documents at this text"
    )
    prepare.add_argument("--seed", type=int, default=0, help="seed of the held-out choice")
    prepare.set_defaults(run=_prepare)


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = commands.add_parser("train", help="train a model")
    _add_config(train)
    add_launcher(train)
    train.add_argument(
        "--dry-run", action="store_true",
        help="check everything (a missing corpus is prepared), print the resolved configuration, "
        "train nothing",
    )  # fmt: skip
    train.add_argument(
        "--max-restarts", type=int, default=0, metavar="N",
        help="without a launcher: after a failure start the ranks again, up to N times; they go on "
        "from the newest checkpoint",
    )  # fmt: skip
    train.set_defaults(run=_train)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML file, or the name of a shipped one, such as demo or 8b_1m_32gpu",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as train.steps=100 parallel.cp=2"
    )


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser("plan", help="predict what a configuration costs")
    _add_config(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument(
        "--cluster", metavar="FILE", help="a cluster's YAML file or name, such as h100_sxm"
    )
    plan.add_argument(
        "--pictures", metavar="DIR", help="write mask, work and timeline of the choice there"
    )
    plan.add_argument(
        "--trace", metavar="FILE", help="write the timeline of the choice as a Chrome trace"
    )
    only = plan.add_mutually_exclusive_group()
    only.add_argument(
        "--fit",
        action="store_true",
        help="predict memory and time of a training step, and the longest sequence that fits",
    )
    only.add_argument(
        "--comment",
        action="store_true",
        help="print the prediction as shipped configurations quote it",
    )
    plan.set_defaults(run=_plan)


def _add_sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    sample = commands.add_parser("sample", help="continue a text with a trained model")
    sample.add_argument("folder", metavar="RUN", help="run folder of a training run")
    sample.add_argument("--prompt", required=True, help="the text to continue")
    sample.add_argument("--tokens", type=int, default=256, help="most new tokens (default 256)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)"
    )
    sample.add_argument(
        "--top-k", type=int, default=50, help="draw among the k likeliest (default 50; 0: all)"
    )
    sample.add_argument("--seed", type=int, default=0, help="seed of the draws")
    sample.set_defaults(run=_sample)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = commands.add_parser("export", help="write a trained model as a Hugging Face folder")
    export.add_argument("folder", metavar="RUN", help="run folder of a training run")
    export.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; new")
    export.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default bf16)"
    )
    export.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="step to export (default: the newest)"
    )
    export.set_defaults(run=_export)


def _prepare(arguments: argparse.Namespace) -> int:
    from ringattn.launch.prepare import prepare

    meta = prepare(
        arguments.source,
        arguments.out,
        tokenizer=arguments.tokenizer,
        holdout=arguments.holdout,
        separator=arguments.separator,
        seed=arguments.seed,
        progress=lambda state: _show(f"{state.documents:,} documents  {state.tokens:,} tokens"),
    )
    print(
        f"wrote {arguments.out}: {meta.documents('train'):,} documents, "
        f"{meta.tokens('train'):,} tokens; held out {meta.documents('heldout'):,} documents, "
        f"{meta.tokens('heldout'):,} tokens"
    )
    for name, value in meta.entropy.items():
        if value is not None:
            print(f"{name} entropy {value['nats']:.4f} nats {value['bits']:.4f} bits per token")
    for reason, count in meta.skipped.items():
        print(f"left out {count:,}: {reason}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from ringattn.launch.config_load import dump_config, load_config
    from ringattn.launch.idle_settings import idle_settings
    from ringattn.launch.train import check_before_start, train

    config = load_config(_find_config(arguments.config), arguments.overrides)
    if arguments.dry_run:
        check_before_start(config)
        for line in idle_settings(config):
            report_line(line)
        print(dump_config(config), end="")
        return 0
    if arguments.max_restarts < 0:
        raise UserError(
            f"--max-restarts={arguments.max_restarts}", "must be at least 0", "leave it out"
        )
    return train(config, arguments.launcher, max_restarts=arguments.max_restarts)


def _plan(arguments: argparse.Namespace) -> int:
    from ringattn.launch.config_load import load_config
    from ringattn.launch.plan_command import plan

    return plan(
        load_config(_find_config(arguments.config), arguments.overrides),
        as_json=arguments.json,
        cluster=arguments.cluster,
        pictures=arguments.pictures,
        trace=arguments.trace,
        fit=arguments.fit,
        comment=arguments.comment,
    )


def _find_config(text: str) -> Path:
    """The file `text`, or the shipped configuration of that name, such as "demo".

    Raises:
        UserError: a name that is neither.
    """
    folder = Path(str(importlib.resources.files("ringattn.configs")))
    given = Path(text)
    if given.exists() or given.name != text or given.suffix:
        return given
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if text not in shipped:
        raise UserError(
            f"config {text!r}", "is no file and no shipped one", f"use one of {', '.join(shipped)}"
        )
    return folder / f"{text}.yaml"


def _sample(arguments: argparse.Namespace) -> int:
    from ringattn.launch.sample_run import sample_run

    sample_run(
        Path(arguments.folder),
        arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        seed=arguments.seed,
        write=lambda text: print(text, flush=True),
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ringattn.launch.export import export_run

    out = Path(arguments.out)
    path = export_run(Path(arguments.folder), out, dtype=arguments.dtype, step=arguments.checkpoint)
    print(f"wrote {out} from {path}")
    return 0


def _show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
