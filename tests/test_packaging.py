"""What is installed is what is in the tree: packages, data, dependencies, wheel and sdist."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.test_imports import imports, python_files

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("benchmarks", "configs", "kernels", "launch", "parallel")
NOT_SHIPPED = ("ringattn/benchmarks/results/",)  # measured figures stay in the repository
IMPORT_NAMES = {"pyyaml": "yaml"}  # distributions whose import has another name
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
EDITABLE = SDIST.replace("build_sdist", "build_editable")
IMPORT = """
import importlib.util, pathlib, sys
sys.path.insert(0, sys.argv[1])
import ringattn.errors
print(pathlib.Path(ringattn.errors.__file__).resolve())
print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])
print(importlib.util.find_spec("ringattn.kernels").origin)
"""


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tree() -> set[str]:
    """Every file below ringattn/, its links followed, as it should stand in the wheel."""
    files = set()
    for folder, folders, names in os.walk(ROOT / "ringattn", followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__" and not f.startswith(".")]
        files |= {Path(folder, name).relative_to(ROOT).as_posix() for name in names}
    return {f for f in files if not f.startswith(NOT_SHIPPED) and not f.endswith((".pyc", ".md"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``copy`` (of the tree), ``sdist``, ``unpacked``, and wheels of both trees."""
    folder = tmp_path_factory.mktemp("build")
    _copy_tree(folder / "copy")
    _python(SDIST, folder / "sdist", cwd=folder / "copy")
    (sdist,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _wheel(folder / "copy", folder / "wheel")
    _wheel(unpacked, folder / "wheel-of-sdist")
    return folder


def _copy_tree(target: Path) -> None:
    """The files a clean checkout would hold, symbolic links kept as links."""
    target.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, target)
    for name in ("ringattn", *LINKED):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)


def _wheel(source: Path, target: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir"]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(target), str(source)], source)


def _python(code: str, *arguments: Path, cwd: Path) -> str:
    for folder in arguments[:1]:
        folder.mkdir(exist_ok=True)
    return _run([sys.executable, "-I", "-c", code, *map(str, arguments)], cwd)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _unzip(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_links_are_relative_and_lead_to_the_real_folders() -> None:
    for name in LINKED:
        assert os.readlink(ROOT / "ringattn" / name) == f"../{name}"
        assert (ROOT / name).is_dir()
        assert not (ROOT / name).is_symlink()


def test_the_type_checker_reads_every_folder_under_its_imported_name(project: dict) -> None:
    wanted = {"ringattn", "tests", *(f"ringattn/{name}" for name in LINKED)}
    assert set(project["tool"]["pyright"]["include"]) == wanted


def test_every_folder_of_tests_is_a_package() -> None:
    # Ranks import a test's functions by module name, which must be the same everywhere.
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_pyproject_lists_every_package(project: dict, tree: set[str]) -> None:
    folders = {str(Path(file).parent) for file in tree if file.endswith(".py")}
    assert {f.replace("/", ".") for f in folders} == set(project["tool"]["setuptools"]["packages"])
    missing = [f for f in sorted(folders) if f"{f}/__init__.py" not in tree]
    assert not missing, f"folders without __init__.py: {missing}"


@pytest.mark.parametrize("wheel", ["wheel", "wheel-of-sdist"])
def test_the_wheel_holds_the_files_of_the_tree(built: Path, tree: set[str], wheel: str) -> None:
    (path,) = (built / wheel).glob("ringattn-*.whl")
    names = {n for n in zipfile.ZipFile(path).namelist() if ".dist-info/" not in n}
    missing, surplus = sorted(tree - names), sorted(names - tree)
    assert not missing, f"not in the wheel (see package-data in pyproject.toml): {missing}"
    assert not surplus, f"in the wheel, not in the tree: {surplus}"


def test_the_wheel_is_used_under_one_name_only(built: Path) -> None:
    site = _unzip(built / "wheel")
    where, bare, kernels = _python(IMPORT, site, *map(Path, LINKED), cwd=built).splitlines()
    assert Path(where).is_relative_to(site)
    assert Path(kernels).is_relative_to(site)
    assert bare == "[]"


def test_an_editable_install_leads_to_the_tree_under_one_name_only(built: Path) -> None:
    _python(EDITABLE, built / "editable", cwd=built / "copy")
    site = _unzip(built / "editable")
    # A .pth file is read only in a site folder; installing the finder does what it would do, in
    # front of the finder that the environment of this test may have under the same name.
    finder = next(site.glob("__editable__*finder.py")).stem
    code = (
        f"import sys; sys.modules.pop({finder!r}, None); sys.path.insert(0, sys.argv[1]); "
        f"import {finder}; {finder}.install(); sys.meta_path.insert(0, sys.meta_path.pop())\n"
    ) + IMPORT
    where, bare, kernels = _python(code, site, *map(Path, LINKED), cwd=built).splitlines()
    assert Path(where) == built / "copy" / "ringattn" / "errors.py"
    assert Path(kernels).resolve().is_relative_to(built / "copy" / "kernels")
    assert bare == "[]"


def test_the_command_exists(project: dict) -> None:
    module, function = project["project"]["scripts"]["ringattn"].split(":")
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert f"\ndef {function}(" in path.read_text(encoding="utf-8")


def test_every_third_party_import_is_declared(project: dict) -> None:
    groups = [project["project"]["dependencies"]]
    groups += project["project"]["optional-dependencies"].values()
    declared = {re.split(r"[^\w-]", requirement)[0] for group in groups for requirement in group}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    known |= {*sys.stdlib_module_names, "ringattn", "tests"}
    undeclared = {
        f"{path.relative_to(ROOT)}:{found.line}: {found.name}"
        for path in python_files(ROOT)
        for found in imports(path.read_text(encoding="utf-8"), "ringattn.x.y")
        if found.name.split(".")[0] not in known
    }
    assert not undeclared, "\n".join(sorted(undeclared))


def test_the_constraints_pin_every_direct_dependency(project: dict) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower() for line in text.splitlines() if "==" in line}
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["test"], *extras["dev"]]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in wanted}
    assert names <= pinned, names - pinned


def test_the_extras_have_their_promised_names(project: dict) -> None:
    extras = project["project"]["optional-dependencies"]
    assert {"deepspeed", "mpi", "hf", "test", "dev"} <= extras.keys()
    assert project["project"]["requires-python"] == ">=3.11"
