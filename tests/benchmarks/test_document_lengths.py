"""Document lengths: shipped and written files, draws."""

from pathlib import Path

import numpy as np
import pytest

from ringattn.benchmarks.suites.document_lengths import read_lengths, shipped_lengths
from ringattn.errors import UserError
from ringattn.launch.prepare import LENGTHS_FILE, prepare


def drawn(name: str, seq_len: int, packs: int = 20) -> np.ndarray:
    return np.concatenate([read_lengths(name).draw(seq_len, pack) for pack in range(packs)])


@pytest.mark.parametrize("seq_len", [128, 1000, 8192, 131072])
@pytest.mark.parametrize("name", ["short", "log_uniform", "long_mix"])
def test_a_pack_fills_the_sequence_and_repeats(name: str, seq_len: int) -> None:
    lengths = read_lengths(name)
    packs = [lengths.draw(seq_len, pack) for pack in range(20)]
    assert all(sum(pack) == seq_len and min(pack) >= 1 for pack in packs)
    assert packs == [lengths.draw(seq_len, pack) for pack in range(20)]
    assert len(set(packs)) >= 19


def test_the_shipped_files_are_what_they_say() -> None:
    assert shipped_lengths() == ("log_uniform", "long_mix", "short")
    short = drawn("short", 1 << 20)
    assert 400 < np.median(short) < 600
    assert 0.005 < (short > 16384).mean() < 0.02
    uniform = drawn("log_uniform", 1 << 18, 50)
    # As many in each octave of 64 to 2^16, the clipped last ones aside.
    counts = np.histogram(np.log2(uniform), bins=np.arange(6, 17))[0]
    assert counts.max() < 2 * counts.min()
    assert uniform.max() <= 1 << 16


def test_the_mix_holds_its_shares() -> None:
    (low, high), seq_len = (8192, 30720), 1 << 20
    for pack in range(3):
        lengths = np.array(read_lengths("long_mix").draw(seq_len, pack))
        middle = lengths[(lengths >= low) & (lengths <= high)].sum() / seq_len
        assert 0.58 < middle < 0.8  # those of the histogram that are as long come on top
        assert np.median(lengths) < 2048


def test_bins_are_drawn_by_weight_and_clipped(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("bins: [[10, 20, 3], [100, 100, 1]]")
    lengths = drawn(str(file), 100_000, 3)
    assert set(np.unique(lengths[lengths > 20])) <= set(range(21, 101))
    assert 0.2 < (lengths == 100).mean() < 0.3
    assert {10, 20} <= set(lengths.tolist())


@pytest.mark.parametrize(
    "text",
    [
        "bins: []", "bins: [[2, 1, 1]]", "bins: [[1, 2, 0]]", "bins: [[1, 2]]", "other: 1",
        "mix: {histogram: log_uniform, histogram_share: 0.4, shortest: 1, longest: 2}",
        "log_uniform: {shortest: 0, longest_share: 0.25}", "[1]", "bins: !!python/object:x {}",
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "lengths.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_lengths(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="long_mix"):
        read_lengths("nothing")


def test_prepare_writes_the_histogram_of_its_corpus(tmp_path: Path) -> None:
    text = "\n---\n".join("x" * n for n in (3, 3, 40, 900, 900, 900))
    (tmp_path / "text.txt").write_text(text)
    prepare(tmp_path / "text.txt", tmp_path / "corpus", separator="\n---\n", holdout=0.0)
    lengths = read_lengths(str(tmp_path / "corpus" / LENGTHS_FILE))
    # Each document has an end-of-document token; bins are powers of two.
    assert lengths.bins == ((4, 7, 2.0), (32, 63, 1.0), (512, 1023, 3.0))
    assert sum(lengths.draw(10_000, 0)) == 10_000
