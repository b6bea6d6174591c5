"""The one report of a job's failure: who failed, where, who does not answer, and all stacks."""

import time
from collections.abc import Mapping
from pathlib import Path

from ringattn.launch.failure_board import Beat
from ringattn.launch.stacks import group_stacks, name_ranks

FOLDER = "failures"  # of a run folder


def compose_report(
    line: str,
    rank: int,
    here: Beat,
    stacks: Mapping[int, str],
    silent: Mapping[int, Beat | None],
) -> str:
    """The report's text.

    Args:
        line: what happened.
        rank: of the reporter. here: where it stands.
        stacks: of the ranks that answered, the reporter's among them.
        silent: the last sign of life of each rank that did not.
    """
    lines = [group_stacks(stacks), f"ringattn: {name_rank(rank, here)}: {line}"]
    never = [r for r, beat in silent.items() if beat is None]
    if never:
        lines.append(f"ringattn: {name_ranks(never)} did not answer")
    for other, beat in silent.items():
        if beat is not None:
            lines.append(
                f"ringattn: {name_rank(other, beat)} did not answer: it was killed or stopped, or "
                "its host or link is gone"
            )
    return "\n".join(lines) + "\n"


def name_rank(rank: int, beat: Beat) -> str:
    """Rank, host and what it did last: "rank 1 on host n3 (pid 77) at step 12, training"."""
    return f"rank {rank} on host {beat.host} (pid {beat.pid}) at {beat.at}"


def write_report(run_dir: Path, rank: int, text: str) -> None:
    """Keeps a report in the run folder, if there is one and it can be written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        if run_dir.is_dir():
            folder = run_dir / FOLDER
            folder.mkdir(exist_ok=True)
            (folder / f"{stamp}-rank{rank}.txt").write_text(text, encoding="utf-8")
    except OSError:
        pass  # the report is on stderr already
