"""``ringattn train`` under torchrun on the hosts of a network, watched from outside."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.hosts.network import Host, Network
from tests.launch.training import REPOSITORY
from tests.ranks import TIMEOUT

# Any port is free in a namespace where nothing else runs, outside of what clients are given.
PORT = 29400
STARTUP_S = TIMEOUT  # a busy machine imports torch slowly, in twice as many processes as ranks
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Output:
    """The lines of a process's pipe, read as they come.

    Attributes:
        lines: so far.
    """

    def __init__(self, pipe: IO[str]) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str, timeout: float) -> re.Match[str]:
        """The first match in a line.

        Raises:
            AssertionError: the output ended without one, or none came in time.
        """
        end, seen = time.monotonic() + timeout, 0
        with self._news:
            while True:
                while seen < len(self.lines):
                    if match := re.search(pattern, self.lines[seen]):
                        return match
                    seen += 1
                if self._ended or not self._news.wait(end - time.monotonic()):
                    why = "it ended" if self._ended else f"{timeout:g} s"
                    raise AssertionError(f"no line {pattern!r}: {why}")

    def matching(self, *patterns: str) -> list[str]:
        """Lines so far in which every pattern is found."""
        return [line for line in list(self.lines) if all(re.search(p, line) for p in patterns)]

    def text(self) -> str:
        """All lines so far."""
        return "\n".join(self.lines)

    def join(self, timeout: float) -> None:
        """Waits until every process that holds the pipe has ended."""
        self._thread.join(timeout)


@dataclass(frozen=True)
class Agent:
    """torchrun on one host.

    Attributes:
        host: where. process: the agent. out, err: its and its rank's outputs.
    """

    host: Host
    process: subprocess.Popen[str]
    out: Output
    err: Output

    def rank_pid(self) -> int:
        """The process of this host's only rank.

        Raises:
            AssertionError: there is none, or more.
        """
        found = [pid for pid in self.host.pids() if _is_rank(pid)]
        assert len(found) == 1, f"{self.host.name}: ranks {found}\n{self.err.text()}"
        return found[0]


@dataclass(frozen=True)
class Job:
    """One training over all hosts of a network."""

    agents: tuple[Agent, ...]

    def wait_for_step(self, step: int, timeout: float = STARTUP_S) -> None:
        """Waits until the progress shows `step`; the config has ``train.log_every=1``."""
        # torchrun numbers new ranks by host name, so the first host shows the progress.
        try:
            self.agents[0].err.wait_for(rf"^step {step}/", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from None

    def finish(self, timeout: float) -> list[int]:
        """Waits for every agent; returns the exit codes.

        Raises:
            AssertionError: with all output, when one is late.
        """
        end = time.monotonic() + timeout
        try:
            codes = [a.process.wait(max(0.0, end - time.monotonic())) for a in self.agents]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout:g} s\n{self.text()}") from None
        for agent in self.agents:
            agent.out.join(10.0)
            agent.err.join(10.0)
        return codes

    def text(self) -> str:
        """Everything that all hosts have written."""
        return "\n".join(
            f"--- {agent.host.name} stdout\n{agent.out.text()}\n--- stderr\n{agent.err.text()}"
            for agent in self.agents
        )


@contextmanager
def start_job(
    network: Network, config: Path, env: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """Starts torchrun with one rank on every host; kills what is left at the end."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for key in _LAUNCH_VARIABLES:
        environment.pop(key, None)
    environment |= env or {}
    agents = []
    try:
        for host in network.hosts:
            process = host.popen(_torchrun(network, config), environment)
            assert process.stdout is not None
            assert process.stderr is not None
            agents.append(Agent(host, process, Output(process.stdout), Output(process.stderr)))
        yield Job(tuple(agents))
    finally:
        for agent in agents:
            agent.host.kill()
            agent.process.wait(10.0)


def _torchrun(network: Network, config: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"{network.hosts[0].name}:{PORT}", "--rdzv-id", "test"]
    launcher += ["--nnodes", str(len(network.hosts)), "--nproc-per-node", "1"]
    return [*launcher, "-m", "ringattn.launch", "train", str(config)]


def _is_rank(pid: int) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False
    return b"ringattn.launch" in argv and any(v.startswith(b"RANK=") for v in environment)


def wait_for_exits(pids: list[int], timeout: float) -> list[int]:
    """Waits until the processes have ended; returns those that have not after `timeout` seconds.

    They need not be children of this process. None may have ended before.
    """
    poll, left = select.poll(), {}
    try:
        for pid in pids:
            left[os.pidfd_open(pid)] = pid
        for pidfd in left:
            poll.register(pidfd, select.POLLIN)
        end = time.monotonic() + timeout
        while left and (now := time.monotonic()) < end:
            for pidfd, _ in poll.poll((end - now) * 1000):
                poll.unregister(pidfd)
                os.close(pidfd)
                del left[pidfd]
        return list(left.values())
    finally:
        for pidfd in left:
            os.close(pidfd)


def stop(pid: int) -> None:
    """SIGSTOP: the process hangs, its connections stay open."""
    os.kill(pid, signal.SIGSTOP)
