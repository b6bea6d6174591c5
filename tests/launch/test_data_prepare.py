"""`prepare`: what lands in the shards, the split, atomicity, and refusals of bad input."""

import json
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ringattn.errors import UserError
from ringattn.launch.corpus import check_corpus, load_meta
from ringattn.launch.data_sources import Source
from ringattn.launch.packing import PackedDataset
from ringattn.launch.prepare import Progress, prepare, prepare_if_missing
from tests.launch.corpora import random_texts, small_corpus, stored_documents, write_jsonl
from tests.launch.test_data_tokenizer import hf_folder


def all_documents(folder: Path) -> list[list[int]]:
    return stored_documents(folder, "train") + stored_documents(folder, "heldout")


def test_shards_hold_every_document_once(tmp_path: Path) -> None:
    folder = small_corpus(tmp_path)
    meta = check_corpus(folder)
    wanted = [[*text.encode(), 256] for text in random_texts(40, 0)]
    assert sorted(all_documents(folder)) == sorted(wanted)
    assert meta.documents("train") + meta.documents("heldout") == 40
    assert len(meta.split("train")) > 2, "the corpus should span several shards"
    assert meta.documents("heldout") > 0


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = random_texts(12, 3)
    folder = tmp_path / "texts" / "nested"
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    (folder / ".hidden").write_text("not me")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    write_jsonl(tmp_path / "a.jsonl", texts)
    table = pyarrow.table({"text": [*texts, None], "id": list(range(13))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("<|end|>".join(texts))
    found = {}
    for source in ("texts", "a.jsonl", "a.parquet", "a.txt"):
        out = tmp_path / "out" / source
        meta = prepare(tmp_path / source, out, holdout=0.3, separator="<|end|>")
        found[source] = [sorted(stored_documents(out, split)) for split in ("train", "heldout")]
        wanted = {"texts": {"binary file": 1}, "a.parquet": {"null text": 1}}.get(source, {})
        assert meta.skipped == wanted
    assert all(documents == found["texts"] for documents in found.values())
    assert found["texts"][1], "nothing was held out"


def test_split_follows_content_not_order(tmp_path: Path) -> None:
    texts = random_texts(60, 1)
    sides = []
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", texts[:40])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        prepare(source, tmp_path / name, holdout=0.3, seed=7)
        held = {tuple(doc) for doc in stored_documents(tmp_path / name, "heldout")}
        sides.append(held)
    assert sides[0] == sides[1]
    first = {(*text.encode(), 256) for text in texts[:40]}
    assert sides[2] == sides[0] & first
    source = write_jsonl(tmp_path / "d.jsonl", texts)
    prepare(source, tmp_path / "d", holdout=0.3, seed=8)
    assert {tuple(doc) for doc in stored_documents(tmp_path / "d", "heldout")} != sides[0]


def test_histogram_and_skips(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "ab", "", "abc", "x" * 100])
    meta = prepare(source, tmp_path / "out", holdout=0)
    assert meta.length_edges == [1, 2, 4, 8, 16, 32, 64, 128]
    assert meta.length_counts["train"] == [0, 2, 1, 0, 0, 0, 1]  # 2, 3, 4 and 101 tokens
    assert meta.skipped == {"empty document": 1}
    assert load_meta(tmp_path / "out") == meta


def test_hf_tokenizer_is_copied_and_wide_ids_fit(tmp_path: Path) -> None:
    words = hf_folder(tmp_path / "words")
    source = write_jsonl(tmp_path / "a.jsonl", ["red green", "blue", "green green red"])
    prepare(source, tmp_path / "out", tokenizer=words, holdout=0)
    assert stored_documents(tmp_path / "out", "train") == [[2, 3, 1], [9, 1], [3, 3, 2, 1]]
    dataset = PackedDataset(tmp_path / "out", "train", 4)
    assert dataset.vocab_size == 10
    assert dataset.tokenizer.decode([2, 9]) == "red blue"


def test_stdlib_source_is_the_interpreters_own(tmp_path: Path) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    source = Source("stdlib")
    names = []
    for document in source:
        names.append(document.name)
        if document.name == "abc.py":
            assert document.text == (root / "abc.py").read_text(encoding="utf-8")
            break
    assert names[-1] == "abc.py"
    assert not any("site-packages" in name for name in names)


def test_progress_and_atomicity(tmp_path: Path) -> None:
    seen: list[Progress] = []
    small_corpus(tmp_path, count=300, progress=seen.append)
    assert [p.documents for p in seen] == [256, 300]
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2.*must be a string"):
        prepare(source, tmp_path / "bad")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source.jsonl", "corpus", "bad.jsonl"}, "a failed run must leave nothing"


def test_prepare_if_missing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", random_texts(30, 0))
    first, wrote = prepare_if_missing(source, tmp_path / "out", holdout=0.2)
    assert wrote
    again, wrote = prepare_if_missing(source, tmp_path / "out", holdout=0.2)
    assert not wrote
    assert again == first
    with pytest.raises(UserError, match=r"prepared with holdout=0\.2.*asked for holdout=0\.1"):
        prepare_if_missing(source, tmp_path / "out", holdout=0.1)


def bad_source(tmp_path: Path, kind: str) -> tuple[Path, dict[str, object], str]:
    """A source, options, and what the refusal must say."""
    path = tmp_path / "in"
    if kind == "missing":
        return path, {}, "is no file and no folder"
    if kind == "empty folder":
        path.mkdir()
        return path, {}, "holds no document with text"
    if kind == "only empty documents":
        return write_jsonl(tmp_path / "in.jsonl", ["", ""]), {}, "left out: 2 empty document"
    if kind == "binary":
        path.write_bytes(b"\0\1\2")
        return path, {}, "is binary"
    if kind == "latin-1":
        path.write_bytes("é".encode("latin-1"))
        return path, {}, "is not UTF-8"
    if kind == "broken line":
        path = tmp_path / "in.jsonl"
        path.write_text('{"text": "a"}\n{"text": \n')
        return path, {}, r"in\.jsonl:2: is no line of JSON"
    if kind == "no text key":
        path = tmp_path / "in.jsonl"
        path.write_text('{"body": "a"}\n')
        return path, {}, r'in\.jsonl:1: must be an object with the key "text"'
    if kind == "broken parquet":
        path = tmp_path / "in.parquet"
        path.write_bytes(b"PAR1 no more")
        return path, {}, "is no Parquet file"
    good = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    options: dict[str, tuple[dict[str, object], str]] = {
        "holdout 1": ({"holdout": 1.0}, r"holdout=1\.0: must be in"),
        "holdout too small": ({"holdout": 1e-9}, "leaves the heldout split without any of the 2"),
        "shard 0": ({"shard_tokens": 0}, "shard_tokens=0"),
        "separator": ({"separator": ""}, "separator=''"),
        "tokenizer": ({"tokenizer": tmp_path / "none"}, "must be"),
    }
    return good, *options[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "empty folder", "only empty documents", "binary", "latin-1", "broken line",
        "no text key", "broken parquet", "holdout 1", "holdout too small", "shard 0",
        "separator", "tokenizer",
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, kind: str) -> None:
    source, options, says = bad_source(tmp_path, kind)
    with pytest.raises(UserError, match=says):
        prepare(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_parquet_without_text_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match='columns body: must include "text"'):
        prepare(tmp_path / "a.parquet", tmp_path / "out")


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    folder = small_corpus(tmp_path)
    with pytest.raises(UserError, match="already exists"):
        prepare(tmp_path / "source.jsonl", folder)


def edit_meta(folder: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((folder / "meta.json").read_text())
    change(raw)
    (folder / "meta.json").write_text(json.dumps(raw))


def corrupt(folder: Path, kind: str) -> str:
    """Breaks the corpus; returns what the refusal must say."""
    shard, index = folder / "train-00001.bin", folder / "train-00001.idx.npy"
    data = bytearray(shard.read_bytes())
    if kind == "flipped bit":
        data[10] ^= 1
        shard.write_bytes(data)
        return r"train-00001\.bin: crc32"
    if kind == "id out of range":
        data[20:22] = (257).to_bytes(2, "little")
        shard.write_bytes(data)
        edit_meta(folder, lambda raw: raw["shards"][1].update(bin_crc32=zlib.crc32(data)))
        return r"train-00001\.bin: document 0, token 10: id 257: must be below vocab_size=257"
    if kind == "truncated":
        shard.write_bytes(data[:-2])
        return r"train-00001\.bin: \d+ bytes.*truncated"
    if kind == "missing shard":
        shard.unlink()
        return r"train-00001\.bin: is missing"
    if kind == "missing index":
        index.unlink()
        return r"train-00001\.idx\.npy: is missing"
    if kind == "falling offsets":
        offsets = np.load(index)
        offsets[1:3] = offsets[2:0:-1].copy()
        np.save(index, offsets)
        return r"train-00001\.idx\.npy: document 1 from token \d+ to \d+: offsets must rise"
    if kind == "pickled index":
        np.save(index, np.array([{}], dtype=object), allow_pickle=True)
        return r"train-00001\.idx\.npy: is no index of offsets"
    if kind == "no meta":
        (folder / "meta.json").unlink()
        return "holds no prepared corpus"
    if kind == "broken meta":
        (folder / "meta.json").write_text("{")
        return r"meta\.json: is not JSON"
    changes: dict[str, tuple[Callable[[dict], object], str]] = {
        "version": (lambda raw: raw.update(format_version=2), "format_version=2"),
        "unknown key": (lambda raw: raw.update(extra=1), "must hold exactly"),
        "dtype": (lambda raw: raw.update(dtype="int8"), "dtype='int8'"),
        "no tokens": (lambda raw: raw["shards"][0].update(tokens=0), "at least one token"),
        "outside": (lambda raw: raw["shards"][0].update(name="../x"), "must be a plain file name"),
    }
    edit_meta(folder, changes[kind][0])
    return changes[kind][1]


@pytest.mark.parametrize(
    "kind",
    [
        "flipped bit", "id out of range", "truncated", "missing shard", "missing index",
        "falling offsets", "pickled index", "no meta", "broken meta", "version", "unknown key",
        "dtype", "outside", "no tokens",
    ],
)  # fmt: skip
def test_corruption_is_named(tmp_path: Path, kind: str) -> None:
    folder = small_corpus(tmp_path)
    check_corpus(folder)
    says = corrupt(folder, kind)
    with pytest.raises(UserError, match=says):
        check_corpus(folder)
    if kind != "flipped bit":  # found by checksum only
        with pytest.raises(UserError, match=says):  # noqa: PT012
            dataset = PackedDataset(folder, "train", 64)
            for i in range(dataset.packs):
                dataset.pack(i)
