"""What can happen to one of several hosts during training, and what has to follow.

Whatever the fault, every rank that is left exits within ``run.timeout_s`` + 10 s with an exit code
other than 0, and the job's stderr names a rank and a step in a line ``ringattn: …``.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.jobs import Agent, Job, start_job, stop, wait_for_exits
from tests.hosts.network import open_network
from tests.launch.training import tiny_values, write_config

GRACE_S = 10.0
TIMEOUT_S = 15.0  # run.timeout_s: on a busy machine ranks come seconds apart without any fault
AGENT_S = 20.0  # until torchrun has noticed that its rank ended
STEPS_BEFORE = 12


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        strike: does it to the host of an agent, whose rank has the given process id.
        victim_survives: whether the rank that is hit goes on and has to exit as well.
    """

    strike: Callable[[Agent, int], None]
    victim_survives: bool


FAULTS = {
    "link cut": Fault(strike=lambda agent, _: agent.host.cut(), victim_survives=True),
    "host gone": Fault(strike=lambda agent, _: agent.host.kill(), victim_survives=False),
    "rank stopped": Fault(strike=lambda _, pid: stop(pid), victim_survives=False),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What followed.

    Attributes:
        step: shown when the fault came. victim: the host that was hit.
        seconds: from the fault to the exit of the last surviving rank.
        reports: lines that name a rank and a step, by host.
    """

    step: int
    victim: str
    seconds: float
    reports: dict[str, list[str]]


def inject(fault: str, hosts: int, seed: int, corpus: Path, folder: Path) -> Outcome:
    """Trains on so many hosts until a fault hits one of them; returns what followed.

    Which host, and after which step, is drawn from the seed.

    Raises:
        AssertionError: a surviving rank did not exit in time, or with 0, or no report came.
    """
    rng = random.Random(seed)
    step, victim = rng.randint(1, STEPS_BEFORE), rng.randrange(hosts)
    values = tiny_values(corpus, folder / "run", parallel__cp=hosts, train__steps=1_000_000)
    values |= {"run.timeout_s": TIMEOUT_S, "train.log_every": 1, "train.eval_every": 1_000_000}
    config = write_config(folder / "config.yaml", values)
    with open_network(hosts) as network, start_job(network, config) as job:
        job.wait_for_step(step)
        hit = job.agents[victim]
        pids = {agent.host.name: agent.rank_pid() for agent in job.agents}
        began = time.monotonic()
        FAULTS[fault].strike(hit, pids[hit.host.name])
        survivors = [a for a in job.agents if a is not hit or FAULTS[fault].victim_survives]
        left = wait_for_exits([pids[a.host.name] for a in survivors], TIMEOUT_S + GRACE_S)
        seconds = time.monotonic() - began
        assert not left, f"{fault} of {hit.host.name}: ranks still there\n{job.text()}"
        for agent in survivors:
            code = _exit_code(agent, pids[agent.host.name])
            assert code != 0, f"{agent.host.name}: exit code 0\n{job.text()}"
        reports = {agent.host.name: _reports(agent) for agent in survivors}
        assert any(reports.values()), f"{fault} of {hit.host.name}: no report\n{job.text()}"
        _refuse_second_start(job)
    return Outcome(step=step, victim=hit.host.name, seconds=seconds, reports=reports)


def _exit_code(agent: Agent, pid: int) -> int:
    """Of a rank that has ended.

    torchrun says it, but hangs for minutes when the job's store is out of reach. Until it asks, the
    kernel keeps what the process left.
    """
    try:
        state, *_, status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state == "Z":
            return os.waitstatus_to_exitcode(int(status))
    except FileNotFoundError:
        pass
    try:
        return int(agent.err.wait_for(r"failed \(exitcode: (-?\d+)\)", AGENT_S)[1])
    except AssertionError:  # the agent failed before its rank did
        return agent.process.wait(AGENT_S)


def _reports(agent: Agent) -> list[str]:
    return agent.err.matching(r"^ringattn: ", r"\brank \d+", r"\bstep \d+")


def _refuse_second_start(job: Job) -> None:
    """Nobody starts training again unless told to."""
    first = [line for agent in job.agents for line in agent.err.matching(r"^step 1/")]
    assert len(first) == 1, job.text()
