"""Rows of a table of published results, read leniently: what is not said has a stated default."""

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ringattn.benchmarks.simulator.tables import base_name, entry_for, memory_gib, same_hardware
from ringattn.benchmarks.simulator.values import LONGEST, TIMES, read_value
from ringattn.cost import load_cluster
from ringattn.cost.step_shapes import ModelShape
from ringattn.errors import UserError

UNSPLIT, LONG = 16384, 65536
"""Tokens of a sequence up to which ranks need not share it, and up to which one pipeline stage of
80 GiB GPUs is enough, where a table does not say."""
MOST = 1e12
"""Counts above are slips of the pen."""
SIZES = ("layers", "hidden", "heads_q", "heads_kv", "ffn", "vocab")


@dataclass(frozen=True)
class Published:
    """A row of the table.

    Attributes:
        line: the row's last in the file, from 2.
        source, hardware, gpus, per_node: as in the table; per_node 0 is not stated.
        model: its name. shape: its sizes; None for attention alone.
        heads: of queries and of keys. head_dim: of one.
        dtype, seq_len, mask, method, checkpointing, metric, unit, note: as in the table.
        value: as a number in SI units (seconds, bytes, TFLOP/s, tokens/s, share); for verdicts 1
            out of memory and 0 fits; None where it cannot be read or cannot be.
        unreadable: why there is no value; empty for metrics of an unknown kind.
        kind: what the figure is: "attention", "tokens", "seconds", "flops", "mfu", "memory",
            "verdict", "length" or "unknown".
        directions: of attention that were timed.
        split: ranks that the note says share what: cp, tp, pp, dp, batch and others by name.
        impossible: cells of gpus and seq_len that hold no count that can be, as in the table.
        sized: whether the model's name gave none of its sizes.
    """

    line: int
    source: str
    hardware: str
    gpus: int
    per_node: int
    model: str
    shape: ModelShape | None
    heads: tuple[int, int]
    head_dim: int
    dtype: str
    seq_len: int
    mask: str
    method: str
    checkpointing: str
    metric: str
    unit: str
    note: str
    value: float | None
    kind: str
    directions: tuple[str, ...] = ()
    split: Mapping[str, float] = field(default_factory=dict)
    unreadable: str = ""
    impossible: Mapping[str, str] = field(default_factory=dict)
    sized: bool = True

    @property
    def run(self) -> tuple:
        """Rows of one run share everything but the figure."""
        return (
            self.source, same_hardware(self.hardware), self.gpus, self.model, self.heads,
            self.seq_len, self.mask, self.method, self.checkpointing, self.cp,
        )  # fmt: skip

    @property
    def setting(self) -> tuple:
        """Rows of one setting differ in method, and in what is tuned with it."""
        return (
            self.source, same_hardware(self.hardware), self.gpus, self.model, self.heads,
            self.seq_len, self.mask,
        )  # fmt: skip

    @property
    def family(self) -> str:
        """Implementations of one method share it."""
        return str(entry_for("methods", self.method)["family"])

    @property
    def cp(self) -> int:
        """Ranks that share a sequence."""
        split = entry_for("methods", self.method)["split"]
        if split in ("none", "tensor"):
            return 1 if "sp" in self.split else int(self.split.get("cp", 1))
        rest = int(self.split.get("tp", 1) * self.split.get("pp", 1) * self.split.get("dp", 1))
        return max(1, int(self.split.get("cp", max(1, self.gpus // max(rest, 1)))))

    @property
    def tp(self) -> int:
        """Ranks that share the products of a layer."""
        if entry_for("methods", self.method)["split"] == "tensor":
            default = self.split.get("sp", min(8, self.gpus))
            if "no-cp" in self.method:  # as many ranks as a long sequence needs, at most the heads
                long = -(-self.seq_len // UNSPLIT)
                default = min(1 << max(0, long - 1).bit_length(), self.gpus, self.per_node or 8)
            return max(1, int(self.split.get("tp", default)))
        return max(1, int(self.split.get("tp", 1)))

    @property
    def pp(self) -> int:
        """Ranks that share the layers."""
        default = 1.0
        if "no-cp" in self.method and "tp" not in self.split and self.tp > 1:
            # Stages until a stage's share of the activations fits, as far as there are ranks.
            gib = memory_named(self.hardware)
            stages = self.seq_len * 80 / (LONG * gib)
            default = min(1 << max(0, round(math.log2(max(stages, 1)))), self.gpus // self.tp)
        return max(1, int(self.split.get("pp", default)))

    def says(self, pattern: str) -> bool:
        """Whether the note says so."""
        return re.search(pattern, self.note.lower()) is not None


def read(path: str | Path) -> list[Published]:
    """All rows of a file.

    Raises:
        UserError: no such file, no CSV, or no header with at least `metric` and `value`.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}", f"cannot be read ({error})", "give a CSV file") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = [(name or "").strip().lower() for name in reader.fieldnames or []]
        if not {"metric", "value"} <= set(names):
            raise UserError(f"{file}", "has no columns metric and value", "give a table of results")
        reader.fieldnames = names
        # The inner reader's count: DictReader's own stops at blank lines that it skips.
        return [parse_row(reader.reader.line_num, entry) for entry in reader]
    except csv.Error as error:
        raise UserError(f"{file}", f"is no CSV ({error})", "give a CSV file") from None


def parse_row(line: int, raw: Mapping[Any, Any]) -> Published:
    """A row from cells by column; see `Published`."""
    entry = {k: (v or "").strip() for k, v in raw.items() if k and isinstance(v, str | None)}
    note, method = entry.get("note", ""), entry.get("method", "")
    model = entry.get("model", "")
    split = _split(f"{note}; {method}")
    known = entry_for("models", model)
    metric, unit = entry.get("metric", "").lower(), entry.get("unit", "")
    heads_q = _int(entry.get("heads_q"), known["heads_q"])
    heads_kv = _int(entry.get("heads_kv"), min(heads_q, known["heads_kv"]))
    width = _int(entry.get("hidden"), 0)
    head_dim = _int(
        entry.get("head_dim"), known.get("head_dim", max(1, (width or 128 * heads_q) // heads_q))
    )
    alone = "attention" in model.lower() or (not model and not width)
    shape = None
    if not alone:
        shape = ModelShape(
            layers=_int(entry.get("layers"), known["layers"]),
            dim=width or known["hidden"],
            heads=heads_q,
            kv_heads=heads_kv,
            head_dim=head_dim,
            ffn_dim=_int(entry.get("ffn"), known["ffn"]),
            vocab_size=_int(entry.get("vocab"), known["vocab"]),
            tied=False,
        )
    seq_len = _corrected(note) or _int(entry.get("seq_len"), 0, LONGEST)
    kind, directions = kind_of(metric, unit, alone)
    if re.search(r"^(oom|fail|out of memory)", entry.get("value", "").lower()):
        kind, directions = "verdict", ()  # in the place of a figure
    value, unreadable = None, ""
    if kind != "unknown":
        try:
            value = read_value(entry.get("value", ""), unit, kind, metric)
        except ValueError as error:
            unreadable = str(error)
    if kind == "memory" and value is not None and unit.lower() == "gb":
        system = entry_for("sources", f"{entry.get('source', '')} | {method}")
        value *= float(system.get("gb", 1e9)) / 1e9
    if kind == "length" and not seq_len:
        seq_len = int(value or 0)
    impossible = {
        name: entry[name]
        for name, most in (("gpus", MOST), ("seq_len", LONGEST))
        if entry.get(name) and not _int(entry[name], 0, most)
    }
    return Published(
        line=line, source=entry.get("source", ""), hardware=entry.get("hardware", ""),
        gpus=max(1, _int(entry.get("gpus"), _int(entry.get("gpus_per_node"), 8))),
        per_node=_int(entry.get("gpus_per_node"), 0), model=model, shape=shape,
        heads=(heads_q, heads_kv), head_dim=head_dim, dtype=entry.get("dtype", "") or "bf16",
        seq_len=seq_len, mask=entry.get("mask", "") or "causal", method=method,
        checkpointing=entry.get("checkpointing", ""), metric=metric, unit=unit, note=note,
        value=value, kind=kind, directions=directions, split=split,
        unreadable=unreadable, impossible=impossible,
        sized=alone or all(_int(entry.get(name), 0) for name in SIZES),
    )  # fmt: skip


def kind_of(metric: str, unit: str, alone: bool) -> tuple[str, tuple[str, ...]]:
    """What a metric measures, and which directions where it is attention alone."""
    if "oom" in metric or unit == "verdict":
        return "verdict", ()
    if "max" in metric and ("len" in metric or "seq" in metric or "context" in metric):
        return "length", ()
    if "mem" in metric:
        return "memory", ()
    if alone:
        return "attention", _directions(metric)
    if "mfu" in metric or "hfu" in metric or "utili" in metric:
        return "mfu", ()
    if "token" in metric or "throughput" in metric or "tokens" in unit.lower():
        return "tokens", ()
    if "flop" in metric or "flop" in unit.lower():
        return "flops", ()
    if unit.lower() in TIMES or "time" in metric or "latency" in metric or "iter" in unit:
        return "seconds", ()
    return "unknown", ()


def _directions(metric: str) -> tuple[str, ...]:
    both = ("forward", "backward")
    if re.search(r"fwd.?\+?.?bwd|fwdbwd|fb_|total|both|forward.?backward", metric):
        return both
    if re.search(r"bwd|backward", metric):
        return both[1:]
    return both[:1] if re.search(r"fwd|forward", metric) else both


def _corrected(note: str) -> int | None:
    """The length that a note gives in place of a cell that it calls wrong."""
    found = re.search(r"equals the (\d+)k .*label is probably wrong", note.lower())
    return int(found.group(1)) << 10 if found else None


@lru_cache(maxsize=256)
def memory_named(hardware: str) -> float:
    """GiB of a GPU of that name."""
    return memory_gib(hardware, load_cluster(base_name(hardware)))


def _int(text: Any, default: int, most: float = MOST) -> int:
    """A count, also with K or M for powers of 1,024; the default where a cell holds none that
    could be meant, from 1 to `most`."""
    plain = str(text).replace(",", "").strip().lower()
    factor = {"k": 2**10, "m": 2**20}.get(plain[-1:], 1)
    try:
        number = float(plain.rstrip("km")) * factor
    except ValueError:
        return int(default)
    return int(number) if 1 <= number <= most else int(default)


_NUMBERS = (
    (r"\b(?:sp_degree|sp|cp|cp_size|context.parallel|ulysses_degree)\s*[= ]\s*(\d+)", "cp"),
    (r"\btp\s*[= ]\s*(\d+)", "tp"),
    (r"\bpp\s*[= ]\s*(\d+)", "pp"),
    (r"\bdp\s*[= ]\s*(\d+)", "dp"),
    (r"\bfsdp\s*[= ]\s*(\d+)", "dp"),
    (r"\b(?:local|micro|global)?.?batch\s*[= ]\s*(\d+)", "batch"),
    (r"micro batch \d+ x (\d+)", "accumulate"),
    (r"zero.?stage\s*[= ]\s*(\d)|zero-(\d)", "zero"),
    (r"zero1=(\d+)", "zero1"),
    (r"\b(?:opt|optimizer).offload\s*=\s*(\d)", "opt_offload"),
    (r"\bact.offload\s*=\s*(\d)", "act_offload"),
    (r"\bparam.offload\s*=\s*(\d)", "param_offload"),
    (r"\btiled.mlp\s*=\s*(\d)", "tiled_mlp"),
    (r"\bliger\s*=\s*(\d)", "fused_loss"),
)


def _split(note: str) -> dict[str, float]:
    """Settings that a note states as `name=number` or `NAME number`."""
    found: dict[str, float] = {}
    plain = note.lower()
    for pattern, name in _NUMBERS:
        match = re.search(pattern, plain)
        if match and name not in found:
            found[name] = float(next(g for g in match.groups() if g is not None))
    if "sp_degree" in plain and "cp" in found:
        found["sp"] = found["cp"]
    return found
