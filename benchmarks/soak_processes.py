"""The processes of a run and what they hold, read from /proc (Linux)."""

import os
import re
from pathlib import Path

from ringattn.benchmarks.soak_report import Sample

_RANK = re.compile(rb"ringattn\.launch|spawn_main")  # started by torchrun, or by the command


def children(pid: int) -> list[int]:
    """Living processes with this parent, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
            if int(parent) == pid and state != "Z":
                found.append((int(rest[17]), int(entry.name)))  # start time, pid
    return [number for _, number in sorted(found)]


def ranks_of(launcher: int) -> list[int]:
    """The launcher's ranks in the order in which they were started, that of their numbers."""
    found = []
    for pid in children(launcher):
        try:
            if _RANK.search(Path(f"/proc/{pid}/cmdline").read_bytes()):
                found.append(pid)
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def look_at(pid: int, role: str, seconds: float) -> Sample | None:
    """A sample of a process; None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmRSS" not in fields:  # it is ending
        return None
    return Sample(
        seconds=seconds, role=role, pid=pid, rss=int(fields["VmRSS"].split()[0]) * 1024,
        files=files, threads=int(fields["Threads"]),
    )  # fmt: skip


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total
