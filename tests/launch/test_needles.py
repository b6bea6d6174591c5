"""Needles: what is written where, and the corpora made of them."""

import re
from pathlib import Path

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch.corpus import check_corpus
from ringattn.launch.main import main
from ringattn.launch.needle_corpus import NeedleCorpus, needle_format, real_text, write_needles
from ringattn.launch.needles import NeedleFormat, NeedleWriter
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import prepare
from ringattn.launch.tokenizer import ByteTokenizer, load_tokenizer
from tests.launch.corpora import small_corpus, stored_documents, write_jsonl

FMT = NeedleFormat(
    statement="<{key}={value}>", question="<{key}?{value}", keys="XYZ", key_length=2,
    values="0123", value_length=3,
)  # fmt: skip
PAIR = re.compile(r"<([XYZ]{2})([=?])([0-3]{3})")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("text"), count=80)


def writer(seed: int = 0, fmt: NeedleFormat = FMT) -> NeedleWriter:
    return NeedleWriter(fmt, ByteTokenizer(), np.random.default_rng(seed))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("distractors", [0, 3])
def test_haystack_holds_the_needle_at_its_depth(depth: float, distractors: int) -> None:
    text = np.full(400, ord("."))
    case = writer().haystack(text, 300, depth, distractors)
    words = bytes(case.tokens.tolist()).decode()
    assert len(words) == 300
    found = PAIR.findall(words)
    assert [mark for _, mark, _ in found] == ["="] * (1 + distractors) + ["?"]
    assert len({key for key, mark, _ in found if mark == "="}) == 1 + distractors
    assert found[-1] == (case.needle.key, "?", case.needle.value)
    assert (case.needle.key, "=", case.needle.value) in found
    assert words.endswith(f"<{case.needle.key}?{case.needle.value}")
    assert case.answer == 3
    # Its place counts the real text before it.
    room = 300 - 8 * (1 + distractors) - 7
    before = words[: words.index(f"<{case.needle.key}=")]
    assert before.count(".") == round(depth * room)
    assert words.count(".") == room


def test_equal_seeds_make_equal_haystacks() -> None:
    text = np.arange(300) % 50
    one, two = (writer(7).haystack(text, 200, 0.5, 2) for _ in range(2))
    assert (one.tokens == two.tokens).all()
    assert (one.tokens != writer(8).haystack(text, 200, 0.5, 2).tokens).any()


def test_training_documents_ask_only_for_what_was_stated() -> None:
    text = np.full(4000, ord("."))
    words = bytes(writer().document(text, 3000, 8).tolist()).decode()
    assert len(words) == 3000
    stated: dict[str, str] = {}
    marks = []
    for key, mark, value in PAIR.findall(words):
        marks.append(mark)
        if mark == "=":
            assert key not in stated
            stated[key] = value
        else:
            assert stated[key] == value
    assert marks.count("?") > 50
    assert len(stated) == 9  # every key there is; after that only questions
    gaps = [len(gap) for gap in re.findall(r"\.+", words)]
    assert 6 <= np.mean(gaps) <= 12


def test_needles_of_a_subword_tokenizer(tmp_path: Path) -> None:
    """The value's tokens are the same in statement and question, and end the sequence."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<end>": 0, "the": 1, "is": 2, ".": 3, "a": 4, "b": 5, "cd": 6, "c": 7, "d": 8}
    model = tokenizers.models.WordPiece(vocab | {"##c": 9, "##d": 10, "[UNK]": 11})
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    fmt = NeedleFormat(
        statement="the {key} is {value} .", question="is {key} the {value}", keys="ab",
        key_length=1, values="cd", value_length=3,
    )  # fmt: skip
    needles = NeedleWriter(fmt, load_tokenizer(tmp_path), np.random.default_rng(0))
    lengths = set()
    for _ in range(20):
        case = needles.haystack(np.zeros(60, np.int64), 50, 0.5, 0)
        tokens = case.tokens.tolist()
        value = tokens[-case.answer :]
        lengths.add(len(value))
        at = tokens.index(1)
        key = 4 if case.needle.key == "a" else 5
        assert tokens[at : at + 4 + len(value)] == [1, key, 2, *value, 3]
        assert tokens[-3 - len(value) :] == [2, key, 1, *value]
    assert lengths == {2, 3}  # of equally long texts


def test_a_corpus_of_needles(corpus: Path, tmp_path: Path) -> None:
    wanted = NeedleCorpus(tokens=5000, shortest=100, longest=400, every=10, seed=3)
    meta = write_needles(corpus, tmp_path / "one", wanted, FMT)
    check_corpus(tmp_path / "one")
    again = write_needles(corpus, tmp_path / "two", wanted, FMT)
    assert meta.shards == again.shards
    assert needle_format(tmp_path / "one") == FMT
    documents = stored_documents(tmp_path / "one", "train")
    lengths = [len(document) - 1 for document in documents]
    assert min(lengths) >= 100
    assert max(lengths) <= 400
    assert 5000 <= sum(lengths) < 5400
    assert meta.tokens("heldout") >= 100
    for document in documents:
        assert document[-1] == 256
        assert 256 not in document[:-1]
        assert len(PAIR.findall(bytes(document[:-1]).decode())) >= 3
    with pytest.raises(UserError, match="already exists"):
        write_needles(corpus, tmp_path / "one", wanted, FMT)
    with pytest.raises(UserError, match="was not made by ringattn needles"):
        needle_format(corpus)


def test_real_text_leaves_document_ends_out(corpus: Path) -> None:
    dataset = PackedDataset(corpus, "train", 50)
    text = real_text(dataset, 30, 500)
    stream = dataset.read(30, 2000).tokens
    assert len(text) >= 500
    assert text.tolist() == stream[stream != 256][: len(text)].tolist()


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "n")
    words = ["needles", str(corpus), "--out", out, "--tokens", "900", "--longest", "300"]
    assert main([*words, "--keys", "pq", "--statement", "{key}:{value};"]) == 0
    assert needle_format(out) == NeedleFormat(keys="pq", statement="{key}:{value};")
    assert main([*words, "--shortest", "301"]) == 2
    assert "longest=300: must be at least shortest=301" in capsys.readouterr().err


def test_held_out_documents_do_not_teach(tmp_path: Path) -> None:
    """Text of each split comes from the same split of the source."""
    texts = [letter * 100 for letter in "abcdefghijklmnopqrstuvw"]
    prepare(write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / "c", holdout=0.3)
    wanted = NeedleCorpus(tokens=9000, shortest=50, longest=90, every=30)
    write_needles(tmp_path / "c", tmp_path / "n", wanted, FMT)
    for split in ("train", "heldout"):
        letters = {d[0] for d in stored_documents(tmp_path / "c", split)}
        used = {t for d in stored_documents(tmp_path / "n", split) for t in d}
        assert used & set(range(97, 120)) == letters & used
        assert used & letters


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"statement": "{value} {key}"}, "needle statement"),
        ({"question": "{key}"}, "needle question"),
        ({"keys": ""}, "needle keys"),
        ({"value_length": 0}, "needle values"),
    ],
)
def test_impossible_formats(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NeedleFormat(**fields)  # type: ignore[arg-type]


def test_no_room() -> None:
    with pytest.raises(UserError, match="needle length 20"):
        writer().haystack(np.zeros(100, np.int64), 20, 0.5, 4)
