"""The command ``ringattn report``."""

import argparse


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``report``."""
    report = commands.add_parser(
        "report", help="make a page of benchmark results",
        description="Writes one HTML page that needs no network and no other file: tables, plots, "
        "what was refused and why, plans, hardware, and the commands that repeat it.",
    )  # fmt: skip
    report.add_argument(
        "results", nargs="+", metavar="RESULTS",
        help="files of records (.jsonl), and folders of such files",
    )  # fmt: skip
    report.add_argument(
        "--out", default="report.html", metavar="FILE", help="page to write (default report.html)"
    )
    report.add_argument("--title", metavar="TEXT", help="heading of the page")
    report.add_argument(
        "--plans", type=int, metavar="N", help="most plans that are pictured (default 12)"
    )
    report.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from ringattn.benchmarks.report import write_report

    given = {"title": arguments.title, "plans": arguments.plans}
    options = {name: value for name, value in given.items() if value is not None}
    path = write_report(arguments.results, arguments.out, **options)
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0
