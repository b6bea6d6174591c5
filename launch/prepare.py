"""Turns a corpus source into a folder of memory-mapped token shards (format: `corpus`)."""

import hashlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringattn.errors import UserError
from ringattn.launch.corpus import (
    FORMAT_VERSION,
    SPLITS,
    CorpusMeta,
    load_meta,
)
from ringattn.launch.corpus_writer import (
    SplitWriter,
    length_histogram,
    lengths_text,
    new_corpus_folder,
)
from ringattn.launch.data_sources import Source
from ringattn.launch.entropy import corpus_entropy
from ringattn.launch.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

LENGTHS_FILE = "lengths.yaml"
_PROGRESS_EVERY = 256


@dataclass(frozen=True)
class Progress:
    """Totals so far, given to the `progress` callable of `prepare`."""

    documents: int
    tokens: int
    current: str


def prepare(
    source: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    holdout: float = 0.02,
    shard_tokens: int = 1 << 28,
    seed: int = 0,
    separator: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusMeta:
    """Writes the corpus folder `out_dir`, whole or not at all.

    Beside the shards lies `LENGTHS_FILE`, the histogram of document lengths that ``ringattn bench``
    draws packs from.

    A document is held out when a hash of (seed, its text) falls below `holdout`, so its side
    depends neither on order nor on the other documents, and copies never straddle the splits.
    Empty documents are skipped. Memory: one document and its tokens.

    Args:
        source: a text, .jsonl (key "text") or .parquet (column "text") file, a folder of those,
            or "stdlib": the running interpreter's standard library.
        out_dir: must not exist, or be an empty folder.
        tokenizer: "bytes", or a Hugging Face tokenizer directory; it is copied into `out_dir`.
        holdout: share of documents for the held-out split, in [0, 1).
        shard_tokens: a shard is closed once it holds this many.
        seed: of the split.
        separator: string at which text files are cut into documents; None: one file, one document.
        progress: called every few hundred documents and at the end.

    Raises:
        UserError: values out of range, unreadable input (naming file and record), no documents,
            or a split left empty.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"holdout={holdout}", "must be in [0, 1)", "use 0.02")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens}", "must be positive", "use 268435456")
    settings = _settings(source, tokenizer, holdout, shard_tokens, seed, separator)
    encoder = load_tokenizer(tokenizer)
    with new_corpus_folder(Path(out_dir)) as work:
        return _write(Source(source, separator), work, encoder, settings, progress)


def prepare_if_missing(
    source: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | Path = "bytes",
    holdout: float = 0.02,
    shard_tokens: int = 1 << 28,
    seed: int = 0,
    separator: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[CorpusMeta, bool]:
    """`prepare`, unless `out_dir` already holds a corpus made with the same source and options.

    Of several processes that call this at once, one wins and the others read its result.

    Returns:
        The corpus's description, and whether this call wrote it.

    Raises:
        UserError: as `prepare`; or `out_dir` holds a corpus made with other settings.
    """
    settings = _settings(source, tokenizer, holdout, shard_tokens, seed, separator)
    described = Path(out_dir) / "meta.json"
    if not described.exists():
        try:
            meta = prepare(
                source,
                out_dir,
                tokenizer=tokenizer,
                holdout=holdout,
                shard_tokens=shard_tokens,
                seed=seed,
                separator=separator,
                progress=progress,
            )
            return meta, True
        except (UserError, OSError):
            if not described.exists():
                raise  # a real failure; otherwise another process was faster
    meta = load_meta(out_dir)
    for key, value in settings.items():
        if meta.settings.get(key) != value:
            raise UserError(
                f"{out_dir}: prepared with {key}={meta.settings.get(key)!r}",
                f"asked for {key}={value!r}",
                "name another folder or remove this one",
            )
    return meta, False


def _settings(
    source: str | Path,
    tokenizer: str | Path,
    holdout: float,
    shard_tokens: int,
    seed: int,
    separator: str | None,
) -> dict[str, Any]:
    stdlib = f"stdlib of Python {platform.python_version()}"
    return {
        "source": stdlib if str(source) == "stdlib" else str(Path(source).resolve()),
        "tokenizer": "bytes" if str(tokenizer) == "bytes" else str(Path(tokenizer).resolve()),
        "holdout": holdout,
        "shard_tokens": shard_tokens,
        "seed": seed,
        "separator": separator,
    }


def _write(
    source: Source,
    work: Path,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    progress: Callable[[Progress], None] | None,
) -> CorpusMeta:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {split: SplitWriter(work, split, dtype, settings["shard_tokens"]) for split in SPLITS}
    documents = tokens = 0
    name = ""
    for document in source:
        name = document.name
        ids = tokenizer.encode(document.text)
        if len(ids) == 0:
            source.skipped["empty document"] += 1
            continue
        held = _is_held_out(document.text, settings["seed"], settings["holdout"])
        tokens += writers["heldout" if held else "train"].add(ids, tokenizer.eos_id)
        documents += 1
        if progress is not None and documents % _PROGRESS_EVERY == 0:
            progress(Progress(documents, tokens, name))
    shards = [shard for split in SPLITS for shard in writers[split].close()]
    _check_splits(source, settings["holdout"], writers)
    edges, counts = length_histogram({split: writers[split].lengths for split in SPLITS})
    meta = CorpusMeta(
        format_version=FORMAT_VERSION,
        tokenizer=copy_tokenizer(tokenizer, work),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=dtype,
        settings=settings,
        shards=shards,
        skipped=dict(source.skipped),
        length_edges=edges,
        length_counts=counts,
        entropy={},
    )
    meta = replace(meta, entropy=corpus_entropy(work, meta))
    (work / LENGTHS_FILE).write_text(lengths_text(edges, counts["train"]), encoding="utf-8")
    (work / "meta.json").write_text(meta.to_json(), encoding="utf-8")
    if progress is not None:
        progress(Progress(documents, tokens, name))
    return meta


def _is_held_out(text: str, seed: int, holdout: float) -> bool:
    digest = hashlib.blake2b(f"{seed}\0".encode(), digest_size=8)
    digest.update(text.encode("utf-8", errors="replace"))
    return int.from_bytes(digest.digest(), "little") < holdout * 2**64


def _check_splits(source: Source, holdout: float, writers: dict[str, SplitWriter]) -> None:
    documents = {split: writer.lengths.total() for split, writer in writers.items()}
    total = sum(documents.values())
    if total == 0:
        left_out = ", ".join(f"{count} {why}" for why, count in source.skipped.items())
        raise UserError(
            f"source={str(source.source)!r}",
            f"holds no document with text (left out: {left_out or 'nothing'})",
            "name text, .jsonl or .parquet files",
        )
    wanted = SPLITS if holdout > 0 else ("train",)
    for split in wanted:
        if documents[split] == 0:
            raise UserError(
                f"holdout={holdout}",
                f"leaves the {split} split without any of the {total} documents",
                "change --holdout or --seed, name a --separator that cuts text files into more "
                "documents, or use --holdout 0",
            )


def copy_tokenizer(tokenizer: Tokenizer, work: Path) -> str:
    """Copies a tokenizer's files into a corpus; returns the entry of its `CorpusMeta`."""
    if tokenizer.name == "bytes":
        return "bytes"
    (work / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(Path(tokenizer.name) / name, work / "tokenizer" / name)
    return "tokenizer"
