"""The command ``ringattn bench``."""

import argparse

from ringattn.errors import UserError
from ringattn.launch.main_context import add_launcher

SUITES = ("kernels", "methods", "masks", "train", "scaling", "all")


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``bench``."""
    bench = commands.add_parser(
        "bench", help="measure kernels, methods, masks, training and scaling",
        description="Measures on the ranks of the launcher that started it, or on ranks of its "
        "own. Every case becomes a record: a figure, a refusal with its reason, or an error. "
        "What is in the folder is not measured again. Exit code 1: a case ended in an error.",
    )  # fmt: skip
    bench.add_argument("suite", choices=SUITES, help="what to measure")
    bench.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="of the settings, such as methods.seq_len=[1024] common.heads=[8,2]",
    )  # fmt: skip
    bench.add_argument(
        "--settings", default="smoke", metavar="NAME",
        help="YAML file, or the name of a shipped one: smoke (default), long, …",
    )  # fmt: skip
    bench.add_argument(
        "--smoke", action="store_true", help="the same as --settings smoke: everything once, small"
    )
    bench.add_argument(
        "--out", default="bench_results", metavar="DIR",
        help="folder of the records, which it adds to (default bench_results)",
    )  # fmt: skip
    bench.add_argument(
        "--ranks", nargs="+", metavar="P", help="numbers of ranks, without a launcher"
    )
    bench.add_argument("--masks", nargs="+", metavar="MASK", help="names, or all, longca, ours")
    bench.add_argument("--methods", nargs="+", metavar="METHOD", help="names, or all")
    bench.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=None,
        help="other systems side by side, where they are installed (default: as the settings say)",
    )  # fmt: skip
    bench.add_argument(
        "--retry", action="store_true",
        help="measure again what was refused or ended in an error, for example after an "
        "installation",
    )  # fmt: skip
    bench.add_argument(
        "--simulate", action="store_true", help="scaling is predicted for clusters, not measured"
    )
    add_launcher(bench)
    bench.set_defaults(run=_bench)


def _count(word: str) -> int:
    if not (word.isascii() and word.isdigit() and int(word)):
        raise UserError(f"--ranks {word}", "must be numbers of ranks", "write --ranks 1 2 4")
    return int(word)


def _bench(arguments: argparse.Namespace) -> int:
    from ringattn.benchmarks.suites.command import Request, bench

    if arguments.smoke and arguments.settings != "smoke":
        raise UserError(
            f"--smoke --settings {arguments.settings}", "name two settings", "leave one out"
        )
    # Overrides that follow a list of names are taken for names.
    lists = {name: getattr(arguments, name) for name in ("ranks", "masks", "methods")}
    late = [word for words in lists.values() if words for word in words if "=" in word]
    names = {k: v and tuple(w for w in v if "=" not in w) for k, v in lists.items()}
    return bench(
        Request(
            suite=arguments.suite,
            settings=arguments.settings,
            out=arguments.out,
            launcher=arguments.launcher,
            ranks=names["ranks"] and tuple(_count(word) for word in names["ranks"]),
            masks=names["masks"],
            methods=names["methods"],
            peers=arguments.peers,
            simulate=arguments.simulate,
            retry=arguments.retry,
            overrides=(*arguments.overrides, *late),
        )
    )
