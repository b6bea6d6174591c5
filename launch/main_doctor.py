"""The command ``ringattn doctor``."""

import argparse

from ringattn.launch.main_context import add_launcher


def add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``doctor``."""
    doctor = commands.add_parser(
        "doctor", help="check a cluster and measure what it can do",
        description="Checks versions, devices, every link and every method on the ranks of the "
        "launcher that started it, or on local ranks of its own, and measures links, matrix "
        "products, attention and copies. Exit code 0: all is right; 1: something is wrong, and "
        "the last lines name it.",
    )  # fmt: skip
    doctor.add_argument(
        "--ranks", type=int, metavar="N",
        help="ranks to start where no launcher did (default one per GPU; 2 without GPUs)",
    )  # fmt: skip
    add_launcher(doctor)
    doctor.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "cuda_shared"),
        help="as run.device of a configuration (default auto)",
    )  # fmt: skip
    doctor.add_argument(
        "--timeout", type=float, default=60.0, metavar="S",
        help="seconds that a step may take before ranks that do not answer are named (default 60)",
    )  # fmt: skip
    doctor.add_argument(
        "--quick", action="store_true", help="fewer masks and shorter measurements: some seconds"
    )
    doctor.add_argument("--json", metavar="FILE", help="write everything that was found")
    doctor.add_argument(
        "--out", metavar="FILE",
        help="write a cluster file for ringattn plan --cluster and attention.cluster",
    )  # fmt: skip
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from ringattn.launch.doctor import Request, doctor

    return doctor(
        Request(
            ranks=arguments.ranks,
            launcher=arguments.launcher,
            device=arguments.device,
            timeout=arguments.timeout,
            quick=arguments.quick,
            json_file=arguments.json,
            out=arguments.out,
        )
    )
