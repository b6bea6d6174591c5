"""Optional packages: which version is there, whether it can be imported, whether a call works."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable


def installed_version(distribution: str, module: str) -> str | None:
    """Version of a distribution, None where it is missing; "unknown" for a module without one."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if module in sys.modules:
            return str(getattr(sys.modules[module], "__version__", "unknown"))
        return "unknown" if importlib.util.find_spec(module) else None


def import_refusal(distribution: str, modules: Iterable[str], install: str) -> str | None:
    """Why modules of a package cannot be imported, in one line; None if they can."""
    modules = tuple(modules)
    version = installed_version(distribution, modules[0].partition(".")[0])
    if version is None:
        return f"{distribution} is not installed: {install}"
    for module in modules:
        try:
            importlib.import_module(module)
        except (
            Exception
        ) as error:  # packages with kernels fail in many ways where those are missing
            return f"{distribution} {version} cannot be imported here: {one_line(error)}"
    return None


def call_refusal(what: str, call: Callable[[], object]) -> str | None:
    """Why a small trial call fails, in one line; None if it works."""
    try:
        call()
    except Exception as error:  # what a kernel raises for a device or dtype is its own affair
        return f"{what}: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """The first line of what an error says, with its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
