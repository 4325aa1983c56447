"""Word vectors: three formats, and files that are not what they say."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from longscan.data.word_vectors import read_vectors
from longscan.errors import LongscanError

WORDS = ["the", "dog", "Straße", "狗"]
VECTORS = np.array([[0.5, -1.25, 3.0], [1e-3, 2.0, 0.0], [-0.125, 7.0, 1.0], [4.0, 5.0, 6.0]], np.float32)
FORMATS = ("word2vec text", "word2vec binary", "GloVe")


def text(words: list[str] = WORDS) -> str:
    return "".join(
        f"{word} {' '.join(str(x) for x in row)}\n" for word, row in zip(words, VECTORS, strict=True)
    )


def binary(break_after: bytes = b"\n") -> bytes:
    rows = [w.encode() + b" " + row.tobytes() + break_after for w, row in zip(WORDS, VECTORS, strict=True)]
    return b"4 3\n" + b"".join(rows)


def content(form: str) -> bytes:
    return {
        "word2vec text": b"4 3\n" + text().encode(),
        "word2vec binary": binary(),
        "GloVe": text().encode(),
    }[form]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_formats_are_told_apart(tmp_path: Path, form: str, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_bytes(gzip.compress(content(form)) if suffix == ".gz" else content(form))
    found = read_vectors(path)
    assert (found.words, found.total, found.format) == (WORDS, 4, form)
    np.testing.assert_array_equal(found.vectors, VECTORS)


def test_binary_without_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(binary(break_after=b""))
    assert read_vectors(tmp_path / "v.bin").words == WORDS


@pytest.mark.parametrize("form", FORMATS)
def test_only_what_is_wanted(tmp_path: Path, form: str) -> None:
    (tmp_path / "v").write_bytes(content(form))
    found = read_vectors(tmp_path / "v", ["狗", "the", "unknown"])
    assert (found.words, found.total) == (["the", "狗"], 4)
    np.testing.assert_array_equal(found.vectors, VECTORS[[0, 3]])
    assert read_vectors(tmp_path / "v", []).vectors.shape == (0, 3)


def test_the_first_of_two_rows_counts(tmp_path: Path) -> None:
    (tmp_path / "v").write_text(text(["the", "dog", "the", "cat"]))
    found = read_vectors(tmp_path / "v")
    assert found.words == ["the", "dog", "cat"]
    np.testing.assert_array_equal(found.vectors[0], VECTORS[0])


def test_words_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "v").write_text(text() + ". . . 1.0 2.0 3.0\n")
    assert read_vectors(tmp_path / "v").words[-1] == ". . ."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"just some prose\n", "holds no word vectors"),
        (b"\x89PNG\r\n\x1a\n0000", "holds no word vectors"),
        (b"0 3\n", "says 0 of 3"),
        (b"4 99999999\n", "says 4 of 99,999,999"),
        (b"5 3\n" + text().encode(), "says it has 5 words, found 4"),
        (b"3 3\n" + text().encode(), "says it has 3 words, found 4"),
        (text().encode() + b"cat 1.0 2.0\n", r"line 5: expected a word and 3 numbers as before, found 2"),
        (text().encode() + b"cat 1.0 2.0 3.0 4.0\n", r"line 5: expected a word and 3 numbers .* found 4"),
        (b"4 2\n" + text().encode(), r"line 2: expected a word and 2 numbers .* found 3"),
        (b"4 4\n" + text().encode(), r"line 2: expected a word and 4 numbers .* found 3"),
        (text().encode() + b"cat 1.0 x 3.0\n", r"word 5 \('cat'\): expected 3 finite numbers"),
        (text().encode() + b"cat 1.0 nan 3.0\n", r"word 5 \('cat'\): expected 3 finite numbers"),
        (binary()[:-9], "cut short or damaged at word 4"),
        (binary() + struct.pack("<3f", 1, 2, 3), "goes on after its 4 words"),
        (binary().replace(b"4 3\n", b"4 2\n"), "cut short or damaged|goes on after|finite"),
        (binary().replace(b"4 3\n", b"9000 3\n"), "cut short or damaged at word 5"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(LongscanError, match=words):
        read_vectors(tmp_path / "v")


def test_a_cut_archive(tmp_path: Path) -> None:
    (tmp_path / "v.gz").write_bytes(gzip.compress(content("GloVe") * 500)[:-20])
    with pytest.raises(LongscanError, match="damaged or cut short"):
        read_vectors(tmp_path / "v.gz")
