"""``ringattn needles``: a corpus of documents that teach retrieval, made from a prepared one."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.corpus import (
    FORMAT_VERSION,
    SPLITS,
    CorpusMeta,
    load_corpus_tokenizer,
    load_meta,
)
from ringattn.launch.corpus_writer import SplitWriter, length_histogram, new_corpus_folder
from ringattn.launch.entropy import corpus_entropy
from ringattn.launch.needles import NeedleFormat, NeedleWriter
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import copy_tokenizer

_SHARD_TOKENS = 1 << 28
_KEY = "needles"


@dataclass(frozen=True, kw_only=True)
class NeedleCorpus:
    """What ``ringattn needles`` is asked for.

    Attributes:
        tokens: of the training split, about; a fiftieth of it is held out.
        shortest, longest: document lengths, drawn log-uniformly between them.
        every: mean tokens of real text between two needles.
        seed: of every draw.
    """

    tokens: int
    shortest: int
    longest: int
    every: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("shortest", 1), ("every", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"needles: {name}={getattr(self, name)}",
                    f"must be at least {least}",
                    f"use {least} or more",
                )
        if self.longest < self.shortest:
            raise UserError(
                f"needles: longest={self.longest}",
                f"must be at least shortest={self.shortest}",
                f"use {self.shortest}",
            )


def write_needles(
    source: str | Path, out_dir: str | Path, wanted: NeedleCorpus, fmt: NeedleFormat
) -> CorpusMeta:
    """Writes a corpus whose documents state and ask for needles in the text of another corpus.

    The text of each split comes from the same split of the source; the tokenizer is the source's,
    so that both can be mixed.

    Args:
        source: prepared corpus.
        out_dir: must not exist, or be an empty folder; it is written whole or not at all.
        wanted: how much of what.
        fmt: how needles read; the corpus remembers it, see `needle_format`.

    Raises:
        UserError: a source that cannot be read, or an output that exists.
    """
    with new_corpus_folder(Path(out_dir)) as work:
        meta = load_meta(source)
        heldout = meta.tokens("heldout") > 0
        writers = {s: SplitWriter(work, s, meta.dtype, _SHARD_TOKENS) for s in SPLITS}
        splits = SPLITS if heldout else SPLITS[:1]
        for number, split in enumerate(splits):
            dataset = PackedDataset(source, split, wanted.longest, wanted.seed)
            tokens = wanted.tokens if split == "train" else max(wanted.tokens // 50, 1)
            rng = np.random.Generator(np.random.PCG64([wanted.seed, number]))
            for document in _documents(dataset, tokens, wanted, fmt, rng):
                writers[split].add(document, meta.eos_id)
        shards = [shard for split in SPLITS for shard in writers[split].close()]
        edges, counts = length_histogram({s: writers[s].lengths for s in SPLITS})
        made = CorpusMeta(
            format_version=FORMAT_VERSION,
            tokenizer=copy_tokenizer(load_corpus_tokenizer(source, meta), work),
            vocab_size=meta.vocab_size,
            eos_id=meta.eos_id,
            dtype=meta.dtype,
            settings={"source": str(source), **asdict(wanted), _KEY: asdict(fmt)},
            shards=shards,
            skipped={},
            length_edges=edges,
            length_counts=counts,
            entropy={},
        )
        made = CorpusMeta(**{**vars(made), "entropy": corpus_entropy(work, made)})
        (work / "meta.json").write_text(made.to_json(), encoding="utf-8")
    return made


def needle_format(folder: str | Path) -> NeedleFormat:
    """How the needles of a corpus made by `write_needles` read.

    Raises:
        UserError: it was made otherwise.
    """
    raw: Any = load_meta(folder).settings.get(_KEY)
    try:
        return NeedleFormat.from_json(raw)
    except (TypeError, KeyError):
        raise UserError(
            f"needles {folder}",
            "was not made by ringattn needles",
            "name a corpus that was, or leave it out for the default needles",
        ) from None


def real_text(dataset: PackedDataset, start: int, length: int) -> np.ndarray:
    """At least `length` tokens from a stream position on, without end-of-document tokens."""
    parts: list[np.ndarray] = []
    found = 0
    while found < length:
        tokens = dataset.read(start, length).tokens
        start += length
        parts.append(tokens[tokens != dataset.meta.eos_id])
        found += len(parts[-1])
    return np.concatenate(parts)


def _documents(
    dataset: PackedDataset,
    tokens: int,
    wanted: NeedleCorpus,
    fmt: NeedleFormat,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    writer = NeedleWriter(fmt, dataset.tokenizer, rng)
    written = start = 0
    low, high = np.log([wanted.shortest, wanted.longest])
    while written < tokens:
        length = round(float(np.exp(rng.uniform(low, high))))
        text = real_text(dataset, start, length)
        yield writer.document(text, length, wanted.every)
        start += length
        written += length
