"""Network namespaces of the kernel: what makes, names, lists and removes them.

Every name says which process made it, so that the leftovers of a killed run can be told from the
namespaces of one that goes on.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PREFIX = "ringattn"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-[0-9a-f]+-\w+")
_FILES = Path("/etc/netns")  # `ip netns exec NAME` shows /etc/netns/NAME/hosts as /etc/hosts
_KILL_S = 10.0


def ip(*arguments: str) -> str:
    """Runs ``ip ARGUMENTS``; returns what it prints.

    Raises:
        RuntimeError: with its message.
    """
    return run(["ip", *arguments])


def run(argv: list[str]) -> str:
    """Runs a short command; returns its standard output.

    Raises:
        RuntimeError: with its message.
    """
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def refusal() -> str | None:
    """Why this machine cannot have hosts of its own; None if it can. Tries it, and cleans up."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command `{tool}`"
    if os.geteuid() != 0:
        return "network namespaces need root"
    remove_leftovers()
    network = new_network()
    name = f"{network}-trial"
    try:
        make(name, "127.0.0.1 localhost\n")
        ip("-n", name, "link", "add", "bridge", "type", "bridge")
        ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
        run([*entering(name, "trial"), "true"])
    except (RuntimeError, OSError) as error:
        return f"the kernel refuses network namespaces: {error}"
    finally:
        remove(name)
    return None


def new_network() -> str:
    """A name for the namespaces of one network; append ``-WHAT`` for each of them."""
    pid = os.getpid()
    return f"{_PREFIX}-{pid}-{_started(pid)}-{secrets.token_hex(3)}"


def make(name: str, hosts: str) -> None:
    """Makes a namespace with its loopback up, and `hosts` as its ``/etc/hosts``."""
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    (_FILES / name).mkdir(parents=True)
    (_FILES / name / "hosts").write_text(hosts)


def entering(name: str, hostname: str) -> list[str]:
    """What to put before a command so that it runs in the namespace, on a host of that name."""
    # The name is a property of the process: a namespace of host names that it takes along.
    enter = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", enter, hostname]


def pids(name: str) -> list[int]:
    """Processes in the namespace."""
    return [int(pid) for pid in ip("netns", "pids", name).split()]


def kill_all(name: str) -> None:
    """Kills every process of the namespace and waits until none is left."""
    end = time.monotonic() + _KILL_S
    while left := pids(name):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            raise RuntimeError(f"processes {left} of {name} do not die")


def remove(name: str) -> None:
    """Kills what runs in the namespace and removes it, its interfaces and its files."""
    if (Path("/run/netns") / name).exists():
        try:
            kill_all(name)
            ip("netns", "delete", name)
        except RuntimeError:
            if (Path("/run/netns") / name).exists():  # else another process cleaned up, too
                raise
    shutil.rmtree(_FILES / name, ignore_errors=True)


def remove_leftovers() -> list[str]:
    """Removes the namespaces of runs that are no more; returns their names."""
    found = {line.split()[0] for line in ip("netns", "list").splitlines() if line}
    found |= {path.name for path in _FILES.iterdir()} if _FILES.is_dir() else set()
    gone = []
    for name in sorted(found):
        if (match := _NAME.fullmatch(name)) and _started(int(match[1])) != int(match[2]):
            remove(name)
            gone.append(name)
    return gone


def _started(pid: int) -> int | None:
    """When the process started, in the kernel's ticks: tells it from a later one of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
