"""Python stacks of this process, and of many ranks in few lines."""

import sys
import threading
import traceback
from collections.abc import Mapping

_DEPTH = 16


def own_stacks() -> str:
    """Stacks of the main thread and of the other threads that run Python, innermost call last.

    Threads that serve reports themselves are left out.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    found = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        name = names.get(ident, "a thread of a library")
        if name.startswith("ringattn-monitor"):
            continue
        lines = traceback.format_list(traceback.extract_stack(frame)[-_DEPTH:])
        title = "" if ident == main else f"thread {name}:\n"
        found.append(title + "".join(lines).rstrip())
    return "\n".join(found)


def group_stacks(stacks: Mapping[int, str]) -> str:
    """The stacks of many ranks, equal ones once: a paragraph for each group of ranks."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(stacks.items()):
        groups.setdefault(text, []).append(rank)
    return "\n".join(f"stack of {name_ranks(ranks)}:\n{text}" for text, ranks in groups.items())


def name_ranks(ranks: list[int]) -> str:
    """Such as "rank 3" or "ranks 0-5, 7"."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(texts)}"
