"""Small corpora for the tests of data, packing and loader."""

import itertools
import json
from pathlib import Path

import numpy as np

from ringattn.launch.prepare import prepare


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One JSON object per text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_texts(count: int, seed: int, longest: int = 60) -> list[str]:
    """Distinct ASCII texts of 1 .. longest characters plus a number that tells them apart."""
    rng = np.random.default_rng(seed)
    return [
        f"{i}:" + bytes(rng.integers(97, 123, rng.integers(1, longest)).tolist()).decode()
        for i in range(count)
    ]


def small_corpus(folder: Path, count: int = 40, seed: int = 0, **options: object) -> Path:
    """A prepared byte corpus of `count` random documents in `folder`/corpus."""
    source = write_jsonl(folder / "source.jsonl", random_texts(count, seed))
    out = folder / "corpus"
    prepare(source, out, **{"holdout": 0.25, "shard_tokens": 200, **options})
    return out


def stored_documents(folder: Path, split: str) -> list[list[int]]:
    """Token lists of a split, read from the raw files and nothing else."""
    documents = []
    for path in sorted(folder.glob(f"{split}-*.bin")):
        tokens = np.frombuffer(path.read_bytes(), "<u2").tolist()
        offsets = np.load(path.with_suffix(".idx.npy")).tolist()
        documents += [tokens[a:b] for a, b in itertools.pairwise(offsets)]
    return documents
