"""A prepared corpus on disk: token shards with document boundaries, and their description.

    meta.json             `CorpusMeta` as JSON
    train-00000.bin       token ids, little-endian uint16 or uint32, documents back to back
    train-00000.idx.npy   int64 (documents + 1,): first token of each document, then the total
    heldout-00000.bin ...
    tokenizer/            copy of a Hugging Face tokenizer's files, when one was used

Every document ends with the end-of-document token and lies within one shard.
"""

import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.errors import UserError
from ringattn.launch.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_READ_BYTES = 1 << 22
_PREPARE_AGAIN = "run ringattn prepare again into a new folder"


class DataError(UserError):
    """A record of a prepared corpus that cannot be read: the message names file and document."""


@dataclass(frozen=True, kw_only=True)
class ShardMeta:
    """One shard. `bin_crc32` and `idx_crc32` are of the whole files."""

    split: str
    name: str
    tokens: int
    documents: int
    bin_crc32: int
    idx_crc32: int


@dataclass(frozen=True, kw_only=True)
class CorpusMeta:
    """What `meta.json` holds.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        tokenizer: "bytes", or "tokenizer" for the copied directory beside it.
        vocab_size, eos_id: of the tokenizer.
        dtype: "uint16" or "uint32".
        settings: what `prepare` was asked for; equal settings give equal shards.
        shards: in order of split and number.
        skipped: count of inputs left out, by reason.
        length_edges, length_counts: histogram of document lengths in tokens (end-of-document
            included) per split; bin i counts length_edges[i] <= length < length_edges[i + 1].
        entropy: "unigram" and "bigram" of the held-out split under the training split's counts,
            each {"nats": x, "bits": y} per predicted token, or null where not measured.
    """

    format_version: int
    tokenizer: str
    vocab_size: int
    eos_id: int
    dtype: str
    settings: dict[str, Any]
    shards: list[ShardMeta]
    skipped: dict[str, int]
    length_edges: list[int]
    length_counts: dict[str, list[int]]
    entropy: dict[str, dict[str, float] | None]

    def split(self, split: str) -> list[ShardMeta]:
        """The shards of one split."""
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: str) -> int:
        """Tokens of one split."""
        return sum(shard.tokens for shard in self.split(split))

    def documents(self, split: str) -> int:
        """Documents of one split."""
        return sum(shard.documents for shard in self.split(split))

    def to_json(self) -> str:
        """The text of `meta.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load_meta(folder: str | Path) -> CorpusMeta:
    """Reads and checks `meta.json`; opens no shard.

    Raises:
        UserError: the folder is no prepared corpus, or of another format version.
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(
            f"data.path={str(folder)!r}",
            "holds no prepared corpus (no meta.json)",
            "make one with: ringattn prepare SOURCE --out DIR, and name DIR",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), f"is not JSON ({error})", _PREPARE_AGAIN) from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={version!r}",
            f"this program reads format {FORMAT_VERSION}",
            _PREPARE_AGAIN,
        )
    try:
        raw["shards"] = [ShardMeta(**shard) for shard in raw["shards"]]
        meta = CorpusMeta(**raw)
    except (TypeError, KeyError):
        wanted = ", ".join(field.name for field in fields(CorpusMeta))
        raise UserError(str(path), f"must hold exactly {wanted}", _PREPARE_AGAIN) from None
    _check_meta(path, meta)
    return meta


def load_corpus_tokenizer(folder: str | Path, meta: CorpusMeta) -> Tokenizer:
    """The tokenizer that the corpus was prepared with."""
    name = meta.tokenizer
    return load_tokenizer(name if name == "bytes" else Path(folder) / name)


def same_tokenizer(
    folder: str | Path, meta: CorpusMeta, other_folder: str | Path, other: CorpusMeta
) -> bool:
    """Whether two corpora hold ids of one tokenizer."""
    described = ("tokenizer", "vocab_size", "eos_id")
    if any(getattr(meta, name) != getattr(other, name) for name in described):
        return False
    if meta.tokenizer == "bytes":
        return True
    files = [Path(f) / meta.tokenizer / "tokenizer.json" for f in (folder, other_folder)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def open_shard(
    folder: str | Path, meta: CorpusMeta, shard: ShardMeta
) -> tuple[np.ndarray, np.ndarray]:
    """Maps one shard into memory.

    Returns:
        tokens (shard.tokens,) of dtype `meta.dtype`, read-only, and int64 offsets
        (documents + 1,).

    Raises:
        UserError: a file is missing, truncated, or disagrees with `meta.json`.
    """
    offsets = load_offsets(folder, meta, shard)
    path = shard_paths(folder, shard.name)[0]
    return np.memmap(path, dtype=DTYPES[meta.dtype], mode="r", shape=(shard.tokens,)), offsets


def load_offsets(folder: str | Path, meta: CorpusMeta, shard: ShardMeta) -> np.ndarray:
    """Where the documents of a shard begin, int64 (documents + 1,).

    Raises:
        UserError: a file of the shard is missing, truncated, or disagrees with `meta.json`.
    """
    bin_path, idx_path = shard_paths(folder, shard.name)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(str(path), "is missing", _PREPARE_AGAIN)
    dtype = DTYPES[meta.dtype]
    size, wanted = bin_path.stat().st_size, shard.tokens * dtype.itemsize
    if size != wanted:
        raise UserError(
            f"{bin_path}: {size} bytes",
            f"meta.json says {shard.tokens} tokens = {wanted} bytes",
            f"the shard is truncated or overwritten: {_PREPARE_AGAIN}",
        )
    try:
        offsets = np.load(idx_path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            str(idx_path), f"is no index of offsets ({error})", _PREPARE_AGAIN
        ) from None
    if (
        offsets.dtype != np.int64
        or offsets.shape != (shard.documents + 1,)
        or offsets[0] != 0
        or offsets[-1] != shard.tokens
    ):
        raise UserError(
            str(idx_path),
            f"must rise from 0 to {shard.tokens} over {shard.documents} documents",
            _PREPARE_AGAIN,
        )
    falling = np.flatnonzero(np.diff(offsets) < 1)
    if len(falling):
        document = int(falling[0])
        raise UserError(
            f"{idx_path}: document {document} from token {offsets[document]} to "
            f"{offsets[document + 1]}",
            f"offsets must rise from 0 to {shard.tokens} over {shard.documents} documents",
            _PREPARE_AGAIN,
        )
    return offsets


def shard_paths(folder: str | Path, name: str) -> tuple[Path, Path]:
    """The .bin and .idx.npy files of the shard `name`."""
    return Path(folder) / f"{name}.bin", Path(folder) / f"{name}.idx.npy"


def check_corpus(folder: str | Path) -> CorpusMeta:
    """Reads every byte of a corpus once and compares checksums, sizes, offsets and token ids.

    Costs one sequential read (about 1 GB/s); bounded memory.

    Raises:
        UserError: naming the file, and the document where an id is out of range.
    """
    meta = load_meta(folder)
    for shard in meta.shards:
        tokens, offsets = open_shard(folder, meta, shard)
        paths = shard_paths(folder, shard.name)
        for path, wanted in zip(paths, (shard.bin_crc32, shard.idx_crc32), strict=True):
            found = file_crc32(path)
            if found != wanted:
                raise UserError(
                    f"{path}: crc32 {found:08x}",
                    f"meta.json says {wanted:08x}, so the file has changed since it was written",
                    _PREPARE_AGAIN,
                )
        step = _READ_BYTES // tokens.itemsize
        for start in range(0, len(tokens), step):
            check_ids(tokens[start : start + step], start, offsets, paths[0], meta.vocab_size)
    return meta


def check_ids(ids: np.ndarray, start: int, offsets: np.ndarray, path: Path, vocab: int) -> None:
    """Refuses ids >= vocab; `start` is the shard token number of ids[0].

    Raises:
        DataError: naming file, document and token.
    """
    if len(ids) == 0 or int(ids.max()) < vocab:
        return
    at = start + int(np.argmax(ids >= vocab))
    document = int(np.searchsorted(offsets, at, side="right")) - 1
    raise DataError(
        f"{path}: document {document}, token {at}: id {int(ids[at - start])}",
        f"must be below vocab_size={vocab}",
        f"the shard is corrupt or of another tokenizer: {_PREPARE_AGAIN}",
    )


def file_crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            value = zlib.crc32(piece, value)
    return value


def _check_meta(path: Path, meta: CorpusMeta) -> None:
    if type(meta.vocab_size) is not int or type(meta.eos_id) is not int or meta.vocab_size < 1:
        raise UserError(
            f"{path}: vocab_size={meta.vocab_size!r}, eos_id={meta.eos_id!r}",
            "must be integers",
            _PREPARE_AGAIN,
        )
    if meta.dtype not in DTYPES:
        raise UserError(
            f"{path}: dtype={meta.dtype!r}", f"must be one of {', '.join(DTYPES)}", _PREPARE_AGAIN
        )
    if meta.tokenizer not in ("bytes", "tokenizer"):
        raise UserError(
            f"{path}: tokenizer={meta.tokenizer!r}",
            'must be "bytes" or "tokenizer"',
            _PREPARE_AGAIN,
        )
    for shard in meta.shards:
        # A name with a separator could point outside the folder.
        if shard.split not in SPLITS or Path(shard.name).name != shard.name:
            raise UserError(
                f"{path}: shard {shard.name!r} of split {shard.split!r}",
                f"must be a plain file name and a split of {', '.join(SPLITS)}",
                _PREPARE_AGAIN,
            )
        counts = (shard.tokens, shard.documents, shard.bin_crc32, shard.idx_crc32)
        if not all(type(n) is int for n in counts) or min(shard.tokens, shard.documents) < 1:
            raise UserError(
                f"{path}: shard {shard.name!r}: counts {counts}",
                "must be integers, with at least one token and document",
                _PREPARE_AGAIN,
            )
