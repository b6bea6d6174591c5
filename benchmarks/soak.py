"""Training with frequent saves and evaluation and a kill every few minutes: does anything grow?

    python -m ringattn.benchmarks.soak [--minutes 20] [--kill-every 300] [--out FOLDER]

Starts ``ringattn train`` on two local ranks that are restarted after a failure, kills a random rank
by SIGKILL again and again, and samples resident memory, open file handles and threads of the
launcher and of every rank, and the bytes of checkpoints. Writes ``soak.jsonl`` (records of what was
judged), ``soak_samples.json`` and ``soak.png``. Exit code 0 where all is flat by the rules of
`ringattn.benchmarks.soak_report` and the run lived to the end, 1 where not. Linux.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringattn.benchmarks.record import Recorder
from ringattn.benchmarks.soak_processes import folder_bytes, look_at, ranks_of
from ringattn.benchmarks.soak_report import Finding, Sample, as_rows, draw, judge
from ringattn.launch.checkpoint import find_checkpoints
from ringattn.launch.config_load import config_from_values, dump_config
from ringattn.launch.metrics import EVAL_FILE, METRICS_FILE, read_lines
from ringattn.launch.prepare import prepare

NAME = "soak"
WORLD, KEEP = 2, 3
START_S = 300.0  # longest wait for the ranks to train, at the start and after a kill
END_S = 90.0


@dataclass
class Soak:
    """What was seen of the run.

    Attributes:
        samples: of processes. disk: (seconds, bytes of checkpoints, free bytes of the disk).
        kills: seconds of each. failures: what went wrong, in words.
    """

    samples: list[Sample] = field(default_factory=list)
    disk: list[tuple[float, int, int]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def write_run(folder: Path, seed: int) -> Path:
    """A corpus and the config of a small run that would take for ever; returns the config."""
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 120))) for _ in range(600)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(source, folder / "corpus", holdout=0.1, seed=seed)
    values: dict[str, Any] = {
        "seed": seed, "run.dir": str(folder / "run"), "run.device": "cpu", "run.timeout_s": 60.0,
        "data.path": str(folder / "corpus"), "data.seq_len": 512, "model.size": "debug",
        "parallel.cp": WORLD, "train.steps": 10**7, "train.eval_every": 50, "train.eval_packs": 4,
        "train.threads_per_rank": 1, "train.log_every": 1000, "checkpoint.every": 20,
        "checkpoint.keep": KEEP,
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(dump_config(config_from_values(values)))
    return config


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """``ringattn train`` with restarts, in a session of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    arguments = ["train", str(config), "--max-restarts", "100000"]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ringattn.launch", *arguments],
            stdout=output, stderr=output, start_new_session=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


class Watch:
    """Samples, kills and checks one run until its time is over."""

    def __init__(self, config: Path, log: Path, *, seed: int, every_s: float) -> None:
        self.run_dir, self.every_s = config.parent / "run", every_s
        self.rng, self.seen = random.Random(seed), Soak()
        self.process, self.began = start(config, log), time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def run(self, total_s: float, kill_every_s: float) -> Soak:
        """Watches for `total_s` seconds, then asks the run to save and end."""
        try:
            next_kill, progress = kill_every_s, (self._step(), 0.0)
            while self.seconds < total_s and not self.seen.failures:
                tick = time.monotonic()
                self._sample()
                if self.process.poll() is not None:
                    self.seen.failures.append(f"the run ended with code {self.process.returncode}")
                if (step := self._step()) != progress[0]:
                    progress = step, self.seconds
                elif self.seconds - progress[1] > START_S:
                    self.seen.failures.append(f"no step for {START_S:g} s after step {step}")
                if self.seconds >= next_kill and total_s - self.seconds > kill_every_s / 2:
                    self._kill()
                    next_kill += kill_every_s
                time.sleep(max(0.0, self.every_s - (time.monotonic() - tick)))
            self._end()
        finally:
            for pid in (*ranks_of(self.process.pid), self.process.pid):
                _signal(pid, signal.SIGKILL)
            self.process.wait()
        return self.seen

    def _sample(self) -> None:
        roles = {"launcher": self.process.pid}
        roles |= {f"rank {n}": pid for n, pid in enumerate(ranks_of(self.process.pid)[:WORLD])}
        taken = [look_at(pid, role, self.seconds) for role, pid in roles.items()]
        if len(roles) == 1 + WORLD:  # else some are missing, and numbers would be wrong
            self.seen.samples += [sample for sample in taken if sample is not None]
        disk = os.statvfs(self.run_dir.parent)
        free = disk.f_bavail * disk.f_frsize
        self.seen.disk.append((self.seconds, folder_bytes(self.run_dir / "checkpoints"), free))

    def _kill(self) -> None:
        ranks = ranks_of(self.process.pid)
        if ranks:
            _signal(self.rng.choice(ranks), signal.SIGKILL)
            self.seen.kills.append(self.seconds)

    def _step(self) -> int:
        """The newest step; reads the end of the file alone."""
        try:
            with (self.run_dir / METRICS_FILE).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def _end(self) -> None:
        """A preemption: the run saves and ends with code 0."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.seen.failures.append(f"it did not end within {END_S:g} s of SIGTERM")
            return
        if code:
            self.seen.failures.append(f"after SIGTERM it ended with code {code}")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def check_run(seen: Soak, run_dir: Path) -> None:
    """Adds what is wrong with the files of the run."""
    steps = [line["step"] for line in read_lines(run_dir / METRICS_FILE)]
    if steps != list(range(1, len(steps) + 1)) or not steps:
        seen.failures.append("metrics.jsonl does not hold every step once")
    if not read_lines(run_dir / EVAL_FILE):
        seen.failures.append("eval.jsonl holds no evaluation")
    if len(find_checkpoints(run_dir)) > KEEP + 1:
        seen.failures.append("more checkpoints are left than checkpoint.keep and one")
    half = seen.disk[len(seen.disk) // 4 :] or [(0.0, 0, 0)]
    most, usual = max(b for _, b, _ in half), sorted(b for _, b, _ in half)[len(half) // 2]
    if usual and most > 3 * usual:
        seen.failures.append(f"checkpoints take up to {most:,} bytes, usually {usual:,}")


def write_results(seen: Soak, findings: list[Finding], out: Path, config: dict[str, Any]) -> None:
    """Records, samples and plot."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "soak.jsonl").unlink(missing_ok=True)
    recorder = Recorder(out / "soak.jsonl")
    units: dict[str, str] = {"rss": "bytes", "files": "files", "threads": "threads"}
    for f in findings:
        case = f"{f.role}-{f'life-{f.life}' if f.life else 'across'}-{f.measure}".replace(" ", "-")
        detail = {"median": f.median, "allowed": f.allowed, "tau": f.tau, "samples": f.samples}
        recorder.ok(NAME, case, f.growth, units[f.measure], config=config | detail)
    for index, failure in enumerate(seen.failures):
        recorder.error(NAME, f"failure-{index}", "count", failure, config=config)
    rows = {"samples": as_rows(seen.samples), "kills": seen.kills, "disk": seen.disk}
    (out / "soak_samples.json").write_text(json.dumps(rows) + "\n")
    title = f"{config['minutes']:g} minutes, {len(seen.kills)} kills, {config['steps']:,} steps"
    draw(seen.samples, seen.kills, out / "soak.png", title)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--kill-every", type=float, default=300.0, help="seconds between kills")
    parser.add_argument("--sample-every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds of a life left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results/soak", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ringattn-soak-") as name:
        folder = Path(name)
        log = folder / "log.txt"
        watch = Watch(write_run(folder, args.seed), log, seed=args.seed, every_s=args.sample_every)
        seen = watch.run(args.minutes * 60, args.kill_every)
        check_run(seen, folder / "run")
        steps = len(read_lines(folder / "run" / METRICS_FILE))
        if seen.failures:
            print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    findings = judge(seen.samples, args.warm_up)
    if not findings:
        seen.failures.append("no process lived long enough to be judged")
    config = {
        "minutes": args.minutes, "kill_every_s": args.kill_every, "warm_up_s": args.warm_up,
        "sample_every_s": args.sample_every, "ranks": WORLD, "kills": len(seen.kills),
        "steps": steps, "seed": args.seed,
    }  # fmt: skip
    write_results(seen, findings, args.out, config)
    for finding in findings:
        print(f"{'flat ' if finding.flat else 'GROWS'} {finding}")
    for failure in seen.failures:
        print(f"FAILED {failure}")
    flat = all(finding.flat for finding in findings)
    print(f"{steps} steps, {len(seen.kills)} kills, {len(seen.samples)} samples: ", end="")
    print("flat" if flat and not seen.failures else "not flat" if not flat else "failed")
    return int(not flat or bool(seen.failures))


if __name__ == "__main__":
    sys.exit(main())
