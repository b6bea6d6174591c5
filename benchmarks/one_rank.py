"""One rank of many: a GPU plays a rank of a large cluster, at the pace of the cluster's network.

    python -m ringattn.benchmarks.one_rank [--cluster h200_sxm] [--ranks 64] [--plans auto ...]

The rank's part of a real plan runs on real kernels; what it receives arrives at the pace of the
cluster file (`ringattn.parallel.paced`). Peers post when the planner predicts it, slower or faster
by as much as this rank's kernels are (`stretch`). Per plan, rank and direction: measured time and
TFLOP/s by exact area, the same kernels without any communication, and the share of the time that
is not kernels ("exposed": waits, packing, merges of what arrives), beside the planner's prediction
for the rank. `late` is how much longer batches took than asked, median and worst per lane, under
this load; the pace on the idle device is printed first.

A plan is "auto" or method/layout. Without a GPU a small configuration runs on the CPU, where
threads keep the pace: a check of the benchmark, not a result. About two minutes; `--seconds`
bounds it, and cases that have a record in the file are not measured again.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.cpu_cost import corpus_lengths
from ringattn.benchmarks.one_rank_price import Prediction
from ringattn.benchmarks.one_rank_run import Played, Player, idle_pace, make_carrier
from ringattn.benchmarks.record import Record, Recorder, read_records, refused
from ringattn.cost import Cluster, load_cluster, price_pair
from ringattn.errors import UserError
from ringattn.parallel.paced import Carrier
from ringattn.schedule import Direction

NAME = "one_rank"
FULL = 64 * 8192  # tokens for which the documents are cut as they are; else in proportion
PLANS = ("auto", "ring/zigzag", "usp/zigzag")
ROLES = ("slowest", "median")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BAR_RATIO, BAR_EXPOSED = 0.15, 0.10  # of the prediction; of auto's time


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is played, and on what.

    Attributes:
        cluster: name or YAML file. ranks: how many it has. tokens: of each rank.
        heads, head_dim, dtype: shapes, bfloat16 on a GPU.
        mask: "documents" (causal, cut like a corpus) or "causal".
        device: "cuda" or "cpu". nbytes: of the messages that measure the idle pace.
    """

    cluster: str = "h200_sxm"
    ranks: int = 64
    tokens: int = 8192
    heads: tuple[int, int] = (64, 8)
    head_dim: int = 128
    dtype: str = "bfloat16"
    mask: str = "documents"
    device: str = "cuda"
    nbytes: int = 64 << 20


SMALL = Setting(
    cluster="cpu_gloo", ranks=16, tokens=256, heads=(8, 2), head_dim=32, dtype="float32",
    device="cpu", nbytes=1 << 20,
)  # fmt: skip


def mask_of(name: str, seq_len: int) -> ra.Mask:
    """The mask of that name."""
    if name == "causal":
        return ra.masks.causal(seq_len)
    if name != "documents":
        raise UserError(f"mask={name}", "must be documents or causal", "pick one")
    ends = np.ceil(np.cumsum(corpus_lengths(FULL)) * (seq_len / FULL)).astype(np.int64)
    lengths = np.diff(np.concatenate([[0], ends]))
    return ra.masks.documents([int(n) for n in lengths if n], causal=True)


def make_plan(name: str, setting: Setting, cluster: Cluster) -> ra.Plan:
    """A plan by "auto" or "method/layout"; what is left open is chosen for the cluster."""
    method, _, layout = name.partition("/")
    context = ra.ContextParallel(
        setting.ranks,
        heads=setting.heads,
        head_dim=setting.head_dim,
        dtype=getattr(torch, setting.dtype),
        method=method,
        layout=layout or "auto",
        cluster=cluster,
    )
    return context.plan(mask_of(setting.mask, setting.ranks * setting.tokens))


def ranks_to_play(plan: ra.Plan, cluster: Cluster, roles: list[str]) -> Iterator[tuple[str, int]]:
    """(role, rank): by predicted time, or a rank that is named by its number."""
    seconds = np.sum(
        [p.rank_seconds for p in price_pair((plan.forward, plan.backward), cluster)], 0
    )
    order = np.argsort(seconds, kind="stable")
    known = {"slowest": int(order[-1]), "median": int(order[len(order) // 2])}
    for role in roles:
        if role not in known and not (role.isdecimal() and int(role) < plan.world):
            raise UserError(
                f"role={role}", f"must be {' or '.join(known)} or below {plan.world}", "pick one"
            )
        yield role, known[role] if role in known else int(role)


def figures(played: Played, predicted: Prediction) -> dict[str, object]:
    """What a record's config says of a measured direction; times in milliseconds."""
    ratio = played.seconds / predicted.seconds
    return {
        "ms": 1e3 * played.seconds,
        "compute_ms": 1e3 * played.compute,
        "host_ms": 1e3 * played.host,
        "exposed": played.exposed,
        "stretch": played.stretch,
        "predicted_ms": 1e3 * predicted.seconds,
        "predicted_compute_ms": 1e3 * predicted.compute,
        "predicted_copies_ms": 1e3 * predicted.copies,
        "predicted_exposed": predicted.exposed,
        "predicted_tflops": predicted.flops / predicted.seconds / 1e12,
        "measured_over_predicted": ratio,
        "within_bar": abs(ratio - 1) <= BAR_RATIO,
        "late": {lane: list(over) for lane, over in played.lateness.items()},
        "batches": len(played.arrivals),
    }


def run(setting: Setting, plans: list[str], roles: list[str], seconds: float, path: Path) -> None:
    """Measures, records and prints every case; leaves out those that no time is left for."""
    device, cluster = torch.device(setting.device), load_cluster(setting.cluster)
    recorder, carrier = Recorder(path), make_carrier(device)
    print(f"idle pace, over asked: {idle_pace(carrier, device, cluster, setting.nbytes)}")
    start, done, total = time.perf_counter(), 0, len(plans) * len(roles)
    for name in plans:
        plan = make_plan(name, setting, cluster)
        for role, rank in ranks_to_play(plan, cluster, roles):
            left = seconds - (time.perf_counter() - start)
            if left <= 0:
                print(f"no time left for {name}, {role} rank")
                continue
            share = left / (total - done) / len(DIRECTIONS) / 2
            _measure(recorder, carrier, plan, setting, (name, role, rank), share)
            done += 1
    write_table(path)


def _measure(
    recorder: Recorder,
    carrier: Carrier,
    plan: ra.Plan,
    setting: Setting,
    case: tuple[str, str, int],
    seconds: float,
) -> None:
    """One rank of a plan, both directions."""
    (name, role, rank), cluster = case, load_cluster(setting.cluster)
    stem = f"{name}-{role}-{setting.mask}-{cluster.name}-{setting.ranks}x{setting.tokens}"
    names = {way: f"{stem}-{setting.device}-{way}" for way in DIRECTIONS}
    todo: list[Direction] = [d for d in DIRECTIONS if not recorder.has(NAME, names[d])]
    if not todo:
        return
    config = asdict(replace(setting, cluster=cluster.name)) | {
        "plan": name, "method": plan.method, "layout": plan.layout.name, "role": role, "rank": rank,
        "documents": len(plan.mask.bands),
    }  # fmt: skip
    try:
        player = Player(plan, rank, torch.device(setting.device), carrier, cluster)
    except torch.OutOfMemoryError as error:
        for direction in todo:
            recorder.error(NAME, names[direction], "TFLOP/s", str(error), config=config)
        return
    for direction in todo:
        predicted, played = player.predictions[direction], player.play(direction, seconds)
        rate = predicted.flops / played.seconds / 1e12
        about = {
            "direction": direction, "kernel": player.kernel, "priced_as": player.priced_as
        }  # fmt: skip
        record = recorder.ok(
            NAME,
            names[direction],
            rate,
            "TFLOP/s",
            spread=rate * played.spread / played.seconds,
            config=config | about | figures(played, predicted),
        )
        print(_row(record), flush=True)


HEADER = (
    "| plan | rank | direction | kernel | ms | TFLOP/s | compute ms | exposed | predicted ms | "
    "measured / predicted | predicted exposed | stretch | host ms | late (median, worst) |"
)


def _row(record: Record) -> str:
    c = record.config
    late = "; ".join(
        f"{lane} {100 * m:+.0f}, {100 * w:+.0f} %" for lane, (m, w) in c["late"].items()
    )
    cells = [
        f"{c['plan']}: {c['method']} over {c['layout']}", f"{c['rank']} ({c['role']})",
        c["direction"], f"{c['kernel']} (as {c['priced_as']})", f"{c['ms']:.3f}",
        f"{record.value:.4g}", f"{c['compute_ms']:.3f}", f"{100 * c['exposed']:.1f} %",
        f"{c['predicted_ms']:.3f}", f"{c['measured_over_predicted']:.2f}",
        f"{100 * c['predicted_exposed']:.1f} %", f"{c['stretch']:.2f}",
        f"{c['host_ms']:.3f}", late or "no messages",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write_table(path: Path) -> None:
    """Writes a table of the file's records beside it."""
    records = [r for r in read_records(path) if r.name == NAME]
    rows = [_row(r) if r.status == "ok" else f"{r.case}: {r.reason}" for r in records]
    hit = [r for r in records if r.status == "ok"]
    near = sum(r.config["within_bar"] for r in hit)
    auto = [r for r in hit if r.config["plan"] == "auto"]
    hidden = sum(r.config["exposed"] < BAR_EXPOSED for r in auto)
    lines = [
        "# One rank of many", "", HEADER, "|---" * HEADER.count(" | ") + "|---|", *rows, "",
        f"Within {BAR_RATIO:.0%} of the prediction: {near} of {len(hit)}. "
        f"Exposed under {BAR_EXPOSED:.0%} for auto: {hidden} of {len(auto)}.",
    ]  # fmt: skip
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    base = Setting() if torch.cuda.is_available() else SMALL
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cluster", default=base.cluster, help="a name or a YAML file")
    parser.add_argument("--ranks", type=int, default=base.ranks)
    parser.add_argument("--tokens", type=int, default=base.tokens, help="of each rank")
    parser.add_argument("--mask", default=base.mask, help="documents or causal")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), help="auto, or method/layout")
    parser.add_argument("--roles", nargs="+", default=list(ROLES), help="slowest, median, a rank")
    parser.add_argument("--seconds", type=float, default=100.0, help="time for the measurements")
    parser.add_argument("--out", default=f"benchmarks/results/{NAME}.jsonl")
    args = parser.parse_args()
    setting = replace(
        base, cluster=args.cluster, ranks=args.ranks, tokens=args.tokens, mask=args.mask
    )
    try:
        run(setting, args.plans, args.roles, args.seconds, Path(args.out))
    except UserError as error:
        refused(error)


if __name__ == "__main__":
    main()
