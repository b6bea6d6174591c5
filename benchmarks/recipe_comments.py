"""Writes what `ringattn plan --comment` predicts to the head of the shipped recipes.

python -m ringattn.benchmarks.recipe_comments
"""

import contextlib
import importlib.resources
import io
from pathlib import Path

from ringattn.launch.main import main as ringattn

RECIPES = ("1b_1m_one_gpu", "8b_1m_32gpu", "8b_4m_64gpu", "70b_1m_512gpu")
"""Shipped configurations that state a prediction: for each one cluster's GPUs."""
_FIRST = "# ringattn plan --comment"


def comment_of(recipe: str) -> list[str]:
    """The lines that the command prints for a recipe."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = ringattn(["plan", recipe, "--comment"])
    if code:
        raise SystemExit(code)
    return out.getvalue().splitlines()


def stated(text: str) -> list[str]:
    """The lines of a recipe's text that state its prediction; none where it has none."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(_FIRST)), len(lines))
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("#")), len(lines))
    return lines[start:stop]


def path_of(recipe: str) -> Path:
    """The recipe's file."""
    return Path(str(importlib.resources.files("ringattn.configs"))) / f"{recipe}.yaml"


def main() -> None:
    """Rewrites every recipe whose statement differs from the command's."""
    for recipe in RECIPES:
        path = path_of(recipe)
        text = path.read_text(encoding="utf-8")
        old = stated(text)
        lines = [line for line in text.splitlines() if line not in old]
        after = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        new = [*lines[:after], *comment_of(recipe), *lines[after:]]
        path.write_text("\n".join(new) + "\n", encoding="utf-8")
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
