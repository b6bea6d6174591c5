"""Tokenizers: raw bytes (built in, nothing to download) or a Hugging Face tokenizer directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ringattn.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: "bytes" or the directory it was read from.
        vocab_size: ids are in [0, vocab_size).
        eos_id: the end-of-document token; `prepare` appends one to every document.
    """

    name: str
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, a one-dimensional integer array, without any special token."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; end-of-document tokens are left out, broken characters become U+FFFD."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte (ids 0 to 255) and end-of-document as id 256."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        """uint8 array of the UTF-8 bytes; a lone surrogate becomes '?'."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Inverse of `encode`."""
        kept = bytes(int(i) for i in ids if int(i) != self.eos_id)
        return kept.decode("utf-8", errors="replace")


class HFTokenizer:
    """A `tokenizer.json` read by the `tokenizers` package (extra `hf`).

    The end-of-document id is `eos_token` of `tokenizer_config.json`.

    Raises:
        UserError: the package, the file or the end-of-document token is missing or unreadable.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.name = str(folder)
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Added tokens may leave gaps, so the number of entries is not the bound on ids.
        self.vocab_size = max(vocab.values()) + 1
        eos = _eos_token(folder / "tokenizer_config.json")
        if eos not in vocab:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: eos_token={eos!r}",
                "is not in the vocabulary of tokenizer.json",
                "set eos_token to a token that the vocabulary holds",
            )
        self.eos_id = vocab[eos]

    def encode(self, text: str) -> np.ndarray:
        """int64 array of ids without special tokens."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` without the special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named `spec`: "bytes", or a directory that holds `tokenizer.json`.

    Raises:
        UserError: `spec` is neither, or the directory cannot be used.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    if not Path(spec).is_dir():
        raise UserError(
            f"tokenizer={str(spec)!r}",
            'must be "bytes" or a directory with a tokenizer.json',
            'use "bytes", or download the tokenizer of a model into a directory and name that',
        )
    return HFTokenizer(spec)


def _read_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError:
        raise UserError(
            f"tokenizer={str(path.parent)!r}",
            "needs the package tokenizers",
            'install it with: pip install "ringattn[hf]"',
        ) from None
    if not path.is_file():
        raise UserError(str(path), "does not exist", "name a directory that holds tokenizer.json")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for malformed files
        reason = str(error).splitlines()[0]
        raise UserError(
            str(path), f"is no tokenizer file ({reason})", "download it again"
        ) from None


def _eos_token(path: Path) -> str:
    fix = 'add a tokenizer_config.json with an "eos_token" entry'
    if not path.is_file():
        raise UserError(str(path), "does not exist, so the end-of-document token is unknown", fix)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), f"is not JSON ({error})", "download it again") from None
    eos = config.get("eos_token") if isinstance(config, dict) else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str):
        raise UserError(f"{path}: eos_token={eos!r}", "must be a string", fix)
    return eos
