"""Byte tokenizer, Hugging Face directories, and their refusals."""

import json
from pathlib import Path

import pytest

from ringattn.errors import UserError
from ringattn.launch.tokenizer import ByteTokenizer, load_tokenizer


def hf_folder(path: Path, eos: object = "<end>") -> Path:
    """A word tokenizer with a gap in its ids, written by the tokenizers package."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path.mkdir()
    vocab = {"<unk>": 0, "<end>": 1, "red": 2, "green": 3, "blue": 9}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return path


@pytest.mark.parametrize("text", ["", "plain", "naïve — 漢字 🙂", "a\r\nb\0c"])
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text


def test_bytes_decode_broken_characters() -> None:
    assert ByteTokenizer().decode([0xE6, 65]) == "\ufffdA"
    assert ByteTokenizer().encode("\ud800").tolist() == [ord("?")]


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "lstrip": False}])
def test_hf_folder(tmp_path: Path, eos: object) -> None:
    tokenizer = load_tokenizer(hf_folder(tmp_path / "words", eos))
    assert tokenizer.vocab_size == 10  # the largest id is 9, though there are five entries
    assert tokenizer.eos_id == 1
    assert tokenizer.encode("red blue").tolist() == [2, 9]
    assert tokenizer.decode([2, 9, 1]) == "red blue"


@pytest.mark.parametrize(
    "breakage, says",
    [
        ("missing folder", "must be"),
        ("missing json", "does not exist"),
        ("broken json", "is no tokenizer file"),
        ("missing config", "end-of-document token is unknown"),
        ("broken config", "is not JSON"),
        ("no eos", "must be a string"),
        ("unknown eos", "is not in the vocabulary"),
    ],
)
def test_hf_refusals(tmp_path: Path, breakage: str, says: str) -> None:
    folder = tmp_path / "words"
    if breakage != "missing folder":
        hf_folder(folder, {"no eos": None, "unknown eos": "<stop>"}.get(breakage, "<end>"))
    if breakage == "missing json":
        (folder / "tokenizer.json").unlink()
    if breakage == "broken json":
        (folder / "tokenizer.json").write_text("{]")
    if breakage == "missing config":
        (folder / "tokenizer_config.json").unlink()
    if breakage == "broken config":
        (folder / "tokenizer_config.json").write_text("{]")
    with pytest.raises(UserError, match=says):
        load_tokenizer(folder)
