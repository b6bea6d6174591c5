"""Who may import whom: one name for every module, and layers that only look down."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("benchmarks", "configs", "kernels", "launch", "parallel")
LOW = ("ringattn.kernels", "ringattn.parallel", "ringattn.errors")
UPPER = ("ringattn.launch", "ringattn.benchmarks")


class Import(NamedTuple):
    """One imported module (absolute name) and where it stands."""

    name: str
    line: int
    lazy: bool  # inside a function


def python_files(root: Path) -> list[Path]:
    """The tree's Python files, each once: symbolic links and hidden folders are not entered."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith((".", "__pycache__", "build", "dist"))]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Every import statement; ``from ringattn import masks`` counts as ``ringattn.masks`` too."""
    stack: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while stack:
        node, lazy = stack.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parts + [node.module or ""]) if node.level else node.module or ""
            base = base.rstrip(".")
            yield Import(base, node.lineno, lazy)
            if base == "ringattn":
                yield from (Import(f"{base}.{a.name}", node.lineno, lazy) for a in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack += [(child, lazy) for child in ast.iter_child_nodes(node)]


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def wrong_imports(path: Path, source: str) -> list[str]:
    """Complaints about one file; ``path`` is relative to the repository."""
    layer = path.parts[0]
    package = ".".join(path.parent.parts)
    package = f"ringattn.{package}" if layer in LINKED else package
    complaints = []
    for found in imports(source, package):
        name, rule = found.name, ""
        inside = is_within(name, ("ringattn",)) and name != "ringattn"
        if is_within(name, LINKED):
            rule = f"import ringattn.{name}"
        elif layer in ("kernels", "parallel") and (
            name == "ringattn" or (inside and not is_within(name, LOW))
        ):
            rule = f"{layer} may import only {', '.join(LOW)}"
        elif layer == "ringattn" and is_within(name, UPPER) and not found.lazy:
            rule = "the core may import the upper layers only inside a function"
        elif layer == "launch" and is_within(name, UPPER[1:]) and not found.lazy:
            rule = "launch may import benchmarks only inside a function"
        elif is_within(name, ("transformers",)) and path != Path("ringattn/hf.py"):
            rule = "only ringattn/hf.py may know transformers" if layer in _LAYERS else ""
        if rule:
            complaints.append(f"{path}:{found.line}: imports {name}: {rule}")
    return complaints


_LAYERS = (*LINKED, "ringattn")


def test_the_tree_keeps_the_rules() -> None:
    files = python_files(ROOT)
    assert len(files) > 10
    complaints = [
        complaint
        for path in files
        for complaint in wrong_imports(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    "path, source",
    [
        ("tests/test_x.py", "import kernels.base"),
        ("launch/x.py", "def f():\n    from parallel import fabric"),
        ("kernels/x.py", "from ringattn.plan import Plan"),
        ("kernels/x.py", "from ringattn import masks"),
        ("kernels/x.py", "import ringattn"),
        ("kernels/x.py", "from ..plan import Plan"),
        ("parallel/x.py", "def f():\n    import ringattn.masks"),
        ("ringattn/x.py", "import ringattn.launch.config"),
        ("ringattn/methods/x.py", "from ..launch import config"),
        ("ringattn/x.py", "from ringattn import benchmarks"),
        ("launch/x.py", "from ringattn.benchmarks.record import Recorder"),
        ("launch/x.py", "import transformers"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert wrong_imports(Path(path), source)


@pytest.mark.parametrize(
    "path, source",
    [
        ("kernels/x.py", "from ringattn.errors import UserError\nfrom . import base"),
        ("parallel/x.py", "from ringattn.kernels.base import Kernel"),
        ("ringattn/x.py", "def f():\n    import ringattn.launch.main"),
        ("ringattn/x.py", "from ringattn import kernels, masks"),
        ("launch/x.py", "def f():\n    from ringattn.benchmarks import record"),
        ("benchmarks/x.py", "import ringattn as ra\nfrom ringattn.launch import config"),
        ("ringattn/hf.py", "import transformers"),
        ("tests/x.py", "import transformers, parallelism"),
    ],
)
def test_a_right_import_is_not(path: str, source: str) -> None:
    assert wrong_imports(Path(path), source) == []
