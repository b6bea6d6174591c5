"""Tables of published results for tests of the simulator."""

import csv
from pathlib import Path

COLUMNS = [
    "source", "hardware", "gpus", "gpus_per_node", "model", "layers", "hidden", "heads_q",
    "heads_kv", "head_dim", "ffn", "vocab", "dtype", "seq_len", "mask", "method", "checkpointing",
    "metric", "value", "unit", "provenance", "note",
]  # fmt: skip
ATTENTION = {
    "source": "bench", "hardware": "H100-80GB", "gpus": "8", "gpus_per_node": "8",
    "model": "attention-only", "layers": "1", "heads_q": "64", "heads_kv": "8", "head_dim": "128",
    "dtype": "bf16", "seq_len": "65536", "mask": "causal", "method": "ulysses",
    "metric": "fwd_tflops_per_gpu", "value": "600", "unit": "TFLOP/s/GPU",
}  # fmt: skip
STEP = {
    "source": "trainer", "hardware": "A800-80GB", "gpus": "8", "gpus_per_node": "8",
    "model": "llama-7b", "layers": "32", "hidden": "4096", "heads_q": "32", "heads_kv": "32",
    "head_dim": "128", "ffn": "11008", "vocab": "32000", "dtype": "bf16", "seq_len": "131072",
    "mask": "causal", "method": "burst", "checkpointing": "layer-input",
    "metric": "tokens_per_s_per_gpu", "value": "900", "unit": "tokens/s/GPU",
    "note": "sp_degree=4; dp=2",
}  # fmt: skip


def write(path: Path, *rows: dict[str, str], columns: list[str] | None = None) -> Path:
    """A table with these rows; cells that a row does not name are empty."""
    names = columns or COLUMNS
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([{name: row.get(name, "") for name in names} for row in rows])
    return path
