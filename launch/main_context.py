"""The commands ``ringattn evaluate`` and ``ringattn needles``."""

import argparse
import dataclasses
import sys

from ringattn.errors import UserError


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``evaluate``."""
    evaluate = commands.add_parser(
        "evaluate", help="test a trained model on long contexts",
        description="Loss by position, loss by context length, and needles in a haystack, with the "
        "newest checkpoint of a run. Writes context.json and pictures.",
    )  # fmt: skip
    evaluate.add_argument("folder", metavar="RUN", help="run folder, or a step-… folder in one")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="changes to the run's configuration, such as parallel.cp=2 model.rope_scaling=yarn",
    )  # fmt: skip
    evaluate.add_argument(
        "--tests", default="position,context,needles", metavar="NAMES",
        help="which ones (default position,context,needles)",
    )  # fmt: skip
    evaluate.add_argument(
        "--lengths", metavar="N,N", help="context lengths (default 1024, 2048, … data.seq_len)"
    )
    evaluate.add_argument(
        "--text", metavar="CORPUS",
        help="prepared corpus whose held-out split is the text (default the run's first one)",
    )  # fmt: skip
    evaluate.add_argument(
        "--needles", metavar="CORPUS",
        help="corpus made by ringattn needles, whose needles are asked for (default: sentences)",
    )  # fmt: skip
    evaluate.add_argument("--depths", type=int, default=8, help="needle places (default 8)")
    evaluate.add_argument(
        "--samples", type=int, default=4,
        help="needles per length and depth, and sequences of the other tests / 4 (default 4)",
    )  # fmt: skip
    evaluate.add_argument(
        "--distractors", type=int, default=4, help="needles with other keys (default 4)"
    )
    evaluate.add_argument(
        "--targets", type=int, default=256, help="tokens predicted per context (default 256)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the needles")
    evaluate.add_argument("--out", metavar="DIR", help="folder to write (default RUN/context)")
    add_launcher(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Adds ``--launcher`` to a command that runs on ranks."""
    from ringattn.launch.launchers import LAUNCHERS

    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="auto",
        help="who started the ranks; none starts ranks on this host (default auto: by the "
        "variables that are set)",
    )  # fmt: skip


def add_needles(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``needles``."""
    from ringattn.launch.needles import NeedleFormat

    needles = commands.add_parser(
        "needles", help="make a corpus that teaches retrieval from a prepared one",
        description="Documents of real text in which keys with values are stated and asked for.",
    )  # fmt: skip
    needles.add_argument("source", metavar="CORPUS", help="folder written by ringattn prepare")
    needles.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new")
    needles.add_argument("--tokens", type=int, required=True, help="tokens of the training split")
    needles.add_argument("--shortest", type=int, default=256, help="tokens (default 256)")
    needles.add_argument("--longest", type=int, default=2048, help="tokens (default 2048)")
    needles.add_argument(
        "--every", type=int, default=64, help="mean tokens of text between needles (default 64)"
    )
    needles.add_argument("--seed", type=int, default=0, help="seed of every draw")
    for field in dataclasses.fields(NeedleFormat):
        needles.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default,
            help=f"of a needle (default {field.default!r})".replace("%", "%%"),
        )  # fmt: skip
    needles.set_defaults(run=_needles)


def _evaluate(arguments: argparse.Namespace) -> int:
    from ringattn.launch.evaluate_run import ContextRequest, evaluate_run

    request = ContextRequest(
        run=arguments.folder,
        tests=tuple(arguments.tests.split(",")),
        lengths=_integers(arguments.lengths),
        text=arguments.text,
        needles=arguments.needles,
        depths=arguments.depths,
        samples=arguments.samples,
        distractors=arguments.distractors,
        targets=arguments.targets,
        seed=arguments.seed,
        out=arguments.out,
    )
    return evaluate_run(request, arguments.overrides, arguments.launcher)


def _needles(arguments: argparse.Namespace) -> int:
    from ringattn.launch.needle_corpus import NeedleCorpus, write_needles
    from ringattn.launch.needles import NeedleFormat

    def given(kind: type) -> dict[str, object]:
        return {f.name: getattr(arguments, f.name) for f in dataclasses.fields(kind)}

    wanted = NeedleCorpus(**given(NeedleCorpus))  # pyright: ignore[reportArgumentType]
    fmt = NeedleFormat(**given(NeedleFormat))  # pyright: ignore[reportArgumentType]
    meta = write_needles(arguments.source, arguments.out, wanted, fmt)
    print(
        f"{arguments.out}: {meta.documents('train'):,} documents, {meta.tokens('train'):,} tokens; "
        f"held out {meta.documents('heldout'):,} documents, {meta.tokens('heldout'):,} tokens",
        file=sys.stderr,
    )
    return 0


def _integers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--lengths {text}", "must be numbers with commas between", "write e.g. 2048,8192"
        ) from None
