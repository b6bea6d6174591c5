"""Attention rows of a table of published results, and the masks that they were measured on."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

import ringattn as ra
from ringattn.errors import UserError
from ringattn.masks import Mask
from ringattn.schedule import Direction

# (longest, number) of each bin of document lengths of MagiAttention's benchmark; lengths are bin
# middles there (exps/dist_attn of SandAI-org/MagiAttention).
LENGTH_BINS = (
    (10, 30254), (50, 391188), (100, 699596), (200, 1377757), (500, 3794735), (1024, 3316785),
    (2048, 2106566), (4096, 988525), (8192, 410002), (16384, 173574), (32768, 115007),
    (65536, 18428), (131072, 22513), (196608, 18284),
)  # fmt: skip
# Documents of ring-flash-attention's benchmark for 8K tokens, multiplied by the number of ranks.
RING_FLASH_ENDS = (
    (8192,),
    (256, 7648, 8192),
    (4096, 8192),
    (3104, 6304, 7904, 8064, 8192),
)
DRAWN, PACKS = 60, 3  # packs that are drawn, and packs of them that stand for all
CLUSTERS = {
    "H100-80GB": "h100_sxm",
    "B200": "b200",
    "A800-80GB": "a800_sxm",
    "H800-80GB": "h800_sxm",
    "A100-80GB (inferred)": "a100_sxm",
}


@dataclass(frozen=True)
class Row:
    """A published figure.

    Attributes:
        source, hardware, gpus, heads, head_dim, seq_len, mask, method: as in the table.
        directions: what was timed. tflops: per GPU. run: what was measured together.
    """

    source: str
    hardware: str
    gpus: int
    heads: tuple[int, int]
    head_dim: int
    seq_len: int
    mask: str
    method: str
    directions: tuple[Direction, ...]
    tflops: float

    @property
    def run(self) -> tuple:
        """Rows of one run share hardware, ranks, lengths, mask and method."""
        return self.hardware, self.gpus, self.heads, self.seq_len, self.mask, self.method

    @property
    def group(self) -> str:
        """Dense masks, documents or window."""
        if self.mask in ("full", "causal"):
            return "dense"
        return "documents" if self.mask.startswith("doc") else "window"

    @property
    def kernel(self) -> str:
        """The kernel that the published system used."""
        if self.method.startswith("kernel-"):
            return self.method.removeprefix("kernel-")
        blackwell = self.hardware == "B200"
        if self.method.startswith("magi"):
            return "ffa-fa4" if blackwell else "ffa"
        if self.source.startswith("Magi"):
            return "cudnn" if blackwell else "fa3_unfused"
        return "fa2"


def read_rows(path: str | Path) -> list[Row]:
    """The attention-only speeds of a table of published results; other rows are left out."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        entries = [e for e in csv.DictReader(file) if e["model"] == "attention-only"]
    rows = [_row(e) for e in entries if e["metric"] != "oom" and e["hardware"] in CLUSTERS]
    if not rows:
        raise UserError(f"{path}", "holds no attention-only rows", "give the table of results")
    return rows


def _row(entry: Mapping[str, str]) -> Row:
    metric, value = entry["metric"], float(entry["value"])
    both: tuple[Direction, ...] = ("forward", "backward")
    kind = metric.split("_")[0]
    directions = {"fwd": both[:1], "bwd": both[1:], "fwdbwd": both}[kind]
    row = Row(
        source=entry["source"], hardware=entry["hardware"], gpus=int(entry["gpus"]),
        heads=(int(entry["heads_q"]), int(entry["heads_kv"])), head_dim=int(entry["head_dim"]),
        seq_len=int(entry["seq_len"]), mask=entry["mask"], method=entry["method"],
        directions=directions, tflops=value,
    )  # fmt: skip
    if entry["unit"] == "TFLOP/s/GPU":
        return row
    seconds = {"s": value, "ms": value / 1000, "iter/s": 1 / value}[entry["unit"]]
    area = float(np.mean([mask.area for mask in masks_of(row)]))
    passes = sum(1.0 if d == "forward" else 2.5 for d in directions)
    flops = 4 * area * row.heads[0] * row.head_dim * passes
    return replace(row, tflops=flops / (1e12 * row.gpus * seconds))


@lru_cache(maxsize=64)
def masks_for(source: str, name: str, seq_len: int, gpus: int) -> tuple[Mask, ...]:
    """The masks that a figure is the mean over: several packs where documents are sampled."""
    if name == "full":
        return (ra.masks.full(seq_len),)
    if name == "causal":
        return (ra.masks.causal(seq_len),)
    if name.startswith("sliding_window"):
        return (ra.masks.sliding_window(seq_len, 1024, 0),)
    causal = name == "doc_causal"
    if source.startswith("ring-flash"):
        lists = [np.diff([0, *ends]) * gpus for ends in RING_FLASH_ENDS]
    else:
        lists = typical_packs(seq_len)
    return tuple(ra.masks.documents([int(n) for n in part], causal) for part in lists)


def masks_of(row: Row) -> tuple[Mask, ...]:
    """The masks of a row."""
    return masks_for(row.source, row.mask, row.seq_len, row.gpus)


def sampled_lengths(seq_len: int, seed: int) -> np.ndarray:
    """Lengths of one pack: documents of the histogram, cut at S/4, shuffled, packed in order.

    A document longer than a quarter of the pack becomes several; so does one at the pack's end.
    """
    limit = seq_len // 4
    tops = np.array([top for top, _ in LENGTH_BINS])
    middle = (np.concatenate([[0], tops[:-1] + 1]) + tops) // 2
    weight = np.array([count for _, count in LENGTH_BINS], dtype=np.float64)
    whole, rest = middle // limit, middle % limit
    lengths = np.concatenate([np.full(len(middle), limit), rest])
    weight = np.concatenate([weight * whole, weight * (rest > 0)])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(lengths, size=seq_len // 64, p=weight / weight.sum())
    # The first document is the rest of one that the pack before cut.
    drawn[0] = max(1, int(drawn[0] * rng.random()))
    ends = np.minimum(np.cumsum(drawn), seq_len)
    sizes = np.diff(np.concatenate([[0], ends]))
    return sizes[sizes > 0]


def typical_packs(seq_len: int) -> list[np.ndarray]:
    """Packs at evenly spaced ranks of mask area among `DRAWN` packs, so that few stand for many."""
    packs = [sampled_lengths(seq_len, seed) for seed in range(DRAWN)]
    order = np.argsort([float((p.astype(np.float64) ** 2).sum()) for p in packs], kind="stable")
    return [packs[order[DRAWN * (2 * i + 1) // (2 * PACKS)]] for i in range(PACKS)]
