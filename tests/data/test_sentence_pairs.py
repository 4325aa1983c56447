"""Parallel text: what is read, what is refused, and which sentences meet in a batch."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.data.documents import iter_documents
from longscan.data.labeled_texts import read_examples
from longscan.data.sentence_pairs import SPECIAL, Batches, IdPairs, TextPairs, read_lines, read_pairs, rows
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.bpe import load_tokenizer, train_bpe

ENGLISH = ["A dog.", "Two cats sit.", "Nobody"]
GERMAN = ["Ein Hund.", "Zwei Katzen sitzen.", "Niemand"]


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    data = ("\n".join(lines) + end).encode()
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wb") as file:
        file.write(data)
    return path


def synthetic(n: int = 200, seed: int = 0) -> IdPairs:
    """Pairs whose first source token is their number."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, (2, n))
    sides = [[np.r_[1000 + i, random.integers(3, 99, k)] for i, k in enumerate(side)] for side in lengths]
    ends = [np.cumsum([len(ids) for ids in side], dtype=np.int64) for side in sides]
    arrays = [np.concatenate(side).astype(np.int32) for side in sides]
    return IdPairs(arrays[0], ends[0], arrays[1], ends[1])


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".xz"])
@pytest.mark.parametrize("end", ["\n", ""], ids=["closed", "open"])
def test_two_files(tmp_path: Path, suffix: str, end: str) -> None:
    source = write(tmp_path / f"en{suffix}", ENGLISH, end)
    target = write(tmp_path / f"de{suffix}", GERMAN, end)
    assert read_pairs(source, target) == (ENGLISH, GERMAN, 0)


@pytest.mark.parametrize("header", [False, True], ids=["bare", "header"])
def test_a_table(tmp_path: Path, header: bool) -> None:
    lines = [f"{a}\t{b}\torigin" for a, b in zip(ENGLISH, GERMAN, strict=True)]
    table = write(tmp_path / "pairs.tsv", ["source\ttarget\torigin"] * header + lines)
    assert read_pairs(table) == (ENGLISH, GERMAN, 0)


@pytest.mark.parametrize(
    "head", ["source\ttarget", "\ufeffSource \t Target", "\r\nsource\ttarget", "source\ttarget\torigin"]
)
def test_a_header_is_no_pair_whatever_ends_its_line(head: str, tmp_path: Path) -> None:
    rows = [f"{a}\t{b} " for a, b in zip(ENGLISH, GERMAN, strict=True)]
    for end in ("\n", "\r\n"):
        path = tmp_path / "pairs.tsv"
        path.write_bytes((end.join([head, *rows]) + end).encode())
        assert read_pairs(path)[:2] == (ENGLISH, GERMAN)
    path.write_text("a\t1\nsource\ttarget\n")
    assert read_pairs(path) == (["a", "source"], ["1", "target"], 0)  # only the first row is a header


def test_lines_of_old_macs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(b"a\t1\rb\t2\r")
    with pytest.raises(LongscanError, match="expected lines that end with LF, got CR alone"):
        read_pairs(tmp_path / "t.tsv")


def test_compressed_in_capitals(tmp_path: Path) -> None:
    write(tmp_path / "en.gz", ENGLISH).rename(tmp_path / "en.GZ")
    assert read_lines(tmp_path / "en.GZ") == ENGLISH


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "long.jsonl", "wb") as file:
        for _ in range(66):
            file.write(b"a" * 2**20)
    for read in (read_lines, lambda path: list(iter_documents(path)), lambda path: read_examples([path])):
        with pytest.raises(LongscanError, match="line 1: expected at most 67,108,864 characters"):
            read(tmp_path / "long.jsonl")


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "en", ["one\ttab", "a\u2028b", "c\x85d\r"])
    assert read_lines(source) == ["one\ttab", "a\u2028b", "c\x85d\r"]
    assert read_pairs(source, write(tmp_path / "de", ["1", "2", "3"])).source == [
        "one\ttab",
        "a\u2028b",
        "c\x85d",
    ]


def test_pairs_with_an_empty_side_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "en", ["a", "", "c", "d"])
    target = write(tmp_path / "de", ["1", "2", " ", "4"])
    pairs = read_pairs(source, target)
    assert pairs == (["a", "d"], ["1", "4"], 2)
    assert str(pairs) == "2 pairs (2 with an empty side dropped)"
    table = write(tmp_path / "t.tsv", ["a\t1", "", "\t2"])
    assert read_pairs(table) == (["a"], ["1"], 2)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        (b"a\nb\n", b"1\n2\n3\n", r"en has 2 lines and .*de has 3.*cut short"),
        (b"a\n", b"", r"en has 1 lines and .*de has 0"),
        (b"", b"", r"no sentence pairs in .*: empty"),
        (b"\n\n", b"1\n2\n", r"no sentence pairs in .*: all 2 have an empty side"),
        (b"caf\xe9\n", b"1\n", r"en is not UTF-8 text: byte 0xE9 at offset 3"),
        (b"a\0b\n", b"1\n", r"NUL"),
    ],
    ids=["unequal", "one-empty", "both-empty", "blank", "latin-1", "binary"],
)
def test_bad_files(tmp_path: Path, source: bytes, target: bytes, words: str) -> None:
    (tmp_path / "en").write_bytes(source)
    (tmp_path / "de").write_bytes(target)
    with pytest.raises(LongscanError, match=words):
        read_pairs(tmp_path / "en", tmp_path / "de")


def test_a_row_without_a_tab_names_its_line(tmp_path: Path) -> None:
    with pytest.raises(LongscanError, match=r"t\.tsv, line 2: expected source and target with a tab"):
        read_pairs(write(tmp_path / "t.tsv", ["a\t1", "b"]))


def test_a_cut_archive(tmp_path: Path) -> None:
    whole = write(tmp_path / "en.gz", ["a dog"] * 999).read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LongscanError, match="damaged"):
        read_pairs(tmp_path / "cut.gz", tmp_path / "en.gz")
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "gone.gz", tmp_path / "en.gz")


def test_rows_frame_and_pad() -> None:
    assert rows([[5, 6], [7]], bos=False).tolist() == [[5, 6, 2], [7, 2, 0]]
    assert rows([[5, 6], [7]], bos=True).tolist() == [[1, 5, 6, 2], [1, 7, 2, 0]]


def test_the_shared_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_bpe([*ENGLISH * 3, *GERMAN * 3], 300, SPECIAL)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eos_id == 2
    text = "Ein <s>Hund</s> 狗 <pad>."
    ids = again.encode(text)
    assert min(ids) > 2  # what is spelled like a special token is text
    assert again.decode([1, *ids, 2, 0, 0]) == text
    with pytest.raises(UsageError, match="expected 259 to"):
        train_bpe(ENGLISH, 258, SPECIAL)


def test_encoding_drops_long_pairs() -> None:
    tokenizer = train_bpe(ENGLISH + GERMAN, 259, SPECIAL)  # letters
    pairs = TextPairs(["abc", "abcd", "ab"], ["1", "2", "12345"], 0)
    ids, kept = IdPairs.encode(pairs, tokenizer, max_len=4)
    assert kept.source == ["abc"]  # three letters and the end
    batch = ids.gather(np.array([0]))
    assert tokenizer.decode(batch.source[0].tolist()) == "abc"
    assert (batch.target[0, 0], batch.target[0, -1], batch.tokens) == (1, 2, 2)
    assert ids.source_lengths.tolist() == [4]


def test_an_epoch_is_every_pair_once() -> None:
    pairs = synthetic()
    batches = Batches(pairs, batch_tokens=200, seed=0)
    epochs = []
    for epoch in range(3):
        steps = [batches.batch(epoch * len(batches) + i) for i in range(len(batches))]
        numbers = [token for batch in steps for token in batch.source[:, 0].tolist()]
        assert sorted(numbers) == list(range(1000, 1200))
        epochs.append(numbers)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    pairs = synthetic()
    one, other = Batches(pairs, 200, seed=3), Batches(pairs, 200, seed=3)
    for step in (50, 7, 0, 51):  # in any order
        a, b = one.batch(step), other.batch(step)
        assert torch.equal(a.source, b.source)
        assert torch.equal(a.target, b.target)
    assert any(
        not torch.equal(one.batch(step).source, Batches(pairs, 200, seed=4).batch(step).source)
        for step in range(3)
    )


def test_batches_are_of_similar_length_and_bounded() -> None:
    pairs = synthetic(2000)
    batches = Batches(pairs, batch_tokens=500, seed=0)
    waste, total = 0, 0
    for step in range(len(batches)):
        batch = batches.batch(step)
        longest = max(batch.source.shape[1], batch.target.shape[1] - 1)
        assert longest * len(batch.source) <= 500 * 1.25  # the order strays from the lengths by some tokens
        waste += int((batch.target == 0).sum() + (batch.source == 0).sum())
        total += batch.target.numel() + batch.source.numel()
    assert waste / total < 0.35  # the two sides have independent lengths here; at random it is 0.5
    assert sum(len(batch.source) for batch in pairs.in_order(500)) == 2000


def test_a_pair_longer_than_a_batch_is_one_by_itself() -> None:
    pairs = synthetic(20)
    assert len(Batches(pairs, batch_tokens=1, seed=0)) == 20


def test_fingerprints_tell_pairs_apart() -> None:
    assert synthetic(seed=0).fingerprint() == synthetic(seed=0).fingerprint()
    assert synthetic(seed=0).fingerprint() != synthetic(seed=1).fingerprint()


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_compressed_file_of_very_many_lines_is_refused(suffix: str, tmp_path: Path) -> None:
    """A list of its lines would take a thousand times the memory that the file takes on the disk."""
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes({".gz": gzip, ".xz": lzma}[suffix].compress(b"\n" * 2**25))
    with pytest.raises(LongscanError, match=r"expected at most 16,777,216 bytes .* decompress it first"):
        read_lines(file)
    file.write_bytes(gzip.compress(b"a\n" * 2**20) if suffix == ".gz" else lzma.compress(b"a\n" * 2**20))
    assert len(read_lines(file)) == 2**20
