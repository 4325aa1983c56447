"""From files to batches: what is read, what is refused, what is held out, and in which order it is learnt."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.data import documents
from longscan.data.documents import Corpus, find_files, iter_documents, iter_pieces, split, training_text
from longscan.data.token_files import Split, TokenDataset, TokenFiles, open_tokens, prepare, windows
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.base import ByteTokenizer
from longscan.tokenizers.bpe import train_bpe

BYTES = ByteTokenizer()


def token_file(folder: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    """Write a token file by hand."""
    np.array(ids, dtype=dtype).tofile(folder / "train.bin")
    counts = {"tokens": len(ids), "bytes": len(ids), "documents": 1}
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype, "splits": {"train": counts}}))
    return folder / "train.bin"


def text_of(split: Split) -> str:
    return BYTES.decode(open_tokens(split.path).tolist())


# Files and documents.


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.MD", "a/c.jsonl.gz", "d.text.xz", ".hidden.txt", ".git/e.txt", "f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find_files(tmp_path)]
    assert found == ["a/c.jsonl.gz", "a/z.MD", "b.txt", "d.text.xz"]
    assert find_files([tmp_path / "f.jpg"]) == [tmp_path / "f.jpg"]


def test_missing_text_says_what_was_found(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").touch()
    with pytest.raises(LongscanError, match=r"found 3 \.jpg\. Expected \.txt"):
        find_files(tmp_path)
    with pytest.raises(LongscanError, match=r"no such file or folder: .*nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="name at least one"):
        find_files([])


def test_every_format_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("二\n\n\nthree".encode()))
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"\n\n\n four\n\n\n\n\n\n \n"))
    (tmp_path / "d.jsonl").write_text(
        '\ufeff{"text": "five\\n\\n\\n", "id": 5}\n\n{"text": " "}\n{"text": "six\\u0000"}'
    )
    expected = ["one\r\n\n", "二", "three", " four", "five\n\n\n", "six\0"]
    assert list(iter_documents(tmp_path, separator="\n\n\n")) == expected
    assert next(iter_documents(tmp_path / "b.txt.xz")) == "二\n\n\nthree"
    (tmp_path / "e.ndjson").write_text('{"body": "seven"}')
    assert list(iter_documents(str(tmp_path / "e.ndjson"), field="body")) == ["seven"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"", "no text in .*a.txt: empty", id="empty"),
        pytest.param("a.txt", b" \n\n", "no text in .*a.txt: empty", id="white-space"),
        pytest.param("a.txt", b"PK\3\4\0", r"byte 0x00 at offset 4 .*NUL", id="binary"),
        pytest.param("a.txt", b"na\xefve caf\xe9", r"byte 0xEF at offset 2 .*iconv", id="latin1"),
        pytest.param("a.txt", "中".encode("utf-16"), "byte 0xFF at offset 0", id="utf16"),
        pytest.param("a.txt", "x" * 40 + "\N{PILE OF POO}", None, id="fine"),
        pytest.param(
            "a.txt", b"x" * 33 + b"\xf0\x9f\x92", "byte 0xF0 at offset 33 .*unexpected end", id="cut"
        ),
        pytest.param("a.txt", b"x" * 15 + b"\xe4\xb8x", "byte 0xE4 at offset 15", id="bad-across-blocks"),
        pytest.param("a.txt.gz", b"plain", r"damaged or not a \.gz file", id="not-gz"),
        pytest.param("a.txt.gz", gzip.compress(b"x" * 99)[:-9], r"damaged or not a \.gz", id="gz-cut"),
        pytest.param("a.txt.xz", b"plain", r"damaged or not a \.xz file", id="not-xz"),
        pytest.param("a.txt.xz", lzma.compress(b"x" * 99)[:-9], r"damaged or not a \.xz", id="xz-cut"),
        pytest.param("a.jsonl", b'{"text": "x"}\n{"text":', r"a\.jsonl:2: not JSON \(Expect", id="bad-json"),
        pytest.param("a.jsonl", b"[" * 99999, r"a\.jsonl:1: not JSON", id="deep-json"),
        pytest.param(
            "a.jsonl", b'\n{"txt": 1, "id": 2}', r"a\.jsonl:2: .*got the fields txt, id", id="no-field"
        ),
        pytest.param("a.jsonl", b'{"text": null}', r"a\.jsonl:1: expected", id="no-text"),
        pytest.param("a.jsonl", b'["x"]', r"a\.jsonl:1: .*got list", id="no-object"),
        pytest.param("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: half of a surrogate", id="surrogate"),
        pytest.param("a.jsonl", b'{"text": "\xe9"}', "byte 0xE9 at offset 10", id="jsonl-latin1"),
    ],
)
def test_bad_files_are_named_with_the_place(
    name: str, content: bytes | str, message: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if message is None:
        assert list(iter_documents(tmp_path, piece_size=16)) == [content]
        return
    with pytest.raises(LongscanError, match=message):
        list(iter_documents(tmp_path / name, piece_size=16))


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="separator"):
        next(iter_pieces(tmp_path, separator=""))


@given(
    words=st.lists(
        st.sampled_from(["\n", "\n\n", " ", "of", "storm,", "x" * 20, "海", "--", "-"]), max_size=80
    ),
    size=st.integers(1, 30),
    separator=st.sampled_from([None, "\n\n\n", "--", "x--"]),
)
@settings(deadline=None)
def test_pieces_are_small_and_add_up_to_the_documents(
    words: list[str], size: int, separator: str | None
) -> None:
    text = "".join(words)
    pieces = list(documents._cut([text[i : i + size] for i in range(0, len(text), size)], separator, 12))
    found = "".join(piece.text + "|" * piece.ends for piece in pieces).split("|")[:-1]
    assert found == [part for part in (text.split(separator) if separator else [text]) if part.strip()]
    assert all(0 < len(piece.text) <= 2 * 12 + size for piece in pieces)


def test_pieces_give_the_tokens_of_the_whole() -> None:
    text = "The storm, it's   said:\n\n\nwas 12 days  \n off.\r\n\tAnd 海上 \n\n then " * 20
    tokenizer = train_bpe([text], 300)
    pieces = list(split(text, 40))
    assert len(pieces) > 20
    assert [token for ids in tokenizer.encode_batch(pieces) for token in ids] == tokenizer.encode(text)


# What is held out.


def split_text(corpus: Corpus) -> dict[str, list[str]]:
    """Read a corpus as {"train": documents, "valid": documents}."""
    splits = {"train": [""], "valid": [""]}
    for name, piece in corpus.pieces():
        splits[name][-1] += piece.text
        if piece.ends:
            splits[name].append("")
    assert all(parts.pop() == "" for parts in splits.values())
    return splits


@pytest.mark.parametrize("piece", [7, 64, 2**20])
def test_the_end_of_a_single_document_is_held_out(piece: int, tmp_path: Path) -> None:
    text = "".join(f"line {number} 海\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    splits = split_text(Corpus(tmp_path, valid_fraction=0.1, piece_size=piece))
    (train,), (valid,) = splits["train"], splits["valid"]
    assert train + valid == text
    assert 0.1 <= len(valid) / len(text) < 0.11
    assert valid.startswith("line 9")


def test_a_text_without_lines_is_divided_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("海" * 100)
    splits = split_text(Corpus(tmp_path, valid_fraction=0.055))
    assert [len(splits["train"][0]), len(splits["valid"][0])] == [94, 6]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    fraction=st.sampled_from([0.01, 0.1, 0.5, 0.99]),
)
@settings(max_examples=60, deadline=None)
def test_about_the_share_is_held_out_and_nothing_is_lost(
    lengths: list[int], fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "share.txt"
    parts = [chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    file.write_text("|".join(parts))
    corpus = Corpus(file, valid_fraction=fraction, separator="|")
    splits = split_text(corpus)
    assert sorted("".join(splits["train"] + splits["valid"])) == sorted("".join(parts))
    share, held = min(math.ceil(fraction * sum(lengths)), sum(lengths) - 1), len("".join(splits["valid"]))
    assert share / 2 <= held <= share
    assert len(set(parts) - set(splits["train"] + splits["valid"])) <= 1  # at most one is torn
    assert list(training_text(file, valid_fraction=fraction, separator="|")) == splits["train"]


def test_no_share_holds_out_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    files = prepare(tmp_path, BYTES, tmp_path / "tokens", valid_fraction=0)
    assert files.valid is None
    assert not (tmp_path / "tokens" / "valid.bin").exists()
    assert text_of(files.train) == "some text\n"
    with pytest.raises(UsageError, match=r"valid_fraction: .* got 1\.5"):
        Corpus(tmp_path, valid_fraction=1.5)


def test_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b", "valid"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = split_text(Corpus([tmp_path], [tmp_path / "valid.txt"]))
    assert splits == {"train": ["a", "b"], "valid": ["valid"]}
    with pytest.raises(LongscanError, match="no text left"):
        Corpus(tmp_path / "a.txt", tmp_path)


# Token files.


def test_prepared_tokens_are_the_documents_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("海 one|two")
    (tmp_path / "v.txt").write_text("three")
    seen = []
    files = prepare(
        tmp_path / "a.txt", BYTES, tmp_path / "x" / "tokens", valid_paths=tmp_path / "v.txt", separator="|",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert open_tokens(files.train.path).tolist() == [*"海 one".encode(), 256, *b"two", 256]
    assert files.valid
    assert open_tokens(files.valid.path).tolist() == [*b"three", 256]
    assert (files.train.tokens, files.train.bytes, files.train.documents) == (12, 10, 2)
    assert (files.valid.tokens, files.valid.bytes, files.valid.documents) == (6, 5, 1)
    assert files.train.path.stat().st_size == 24
    assert seen[-1] == (15, 15)
    assert TokenFiles.open(tmp_path / "x" / "tokens") == files
    meta = json.loads((tmp_path / "x" / "tokens" / "meta.json").read_text())
    assert meta["dtype"] == "uint16"
    assert meta["sources"]["train"][0]["bytes"] == 11
    assert files.train.bits_per_byte(8 * math.log(2)) == pytest.approx(8 * 12 / 10)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Large(ByteTokenizer):
        vocab_size = 70_000
        eos_id = 69_999

    (tmp_path / "a.txt").write_text("ab")
    files = prepare(tmp_path / "a.txt", Large(), tmp_path / "tokens", valid_fraction=0)
    assert open_tokens(files.train.path).tolist() == [97, 98, 69_999]
    assert files.train.path.stat().st_size == 12


class Counting(ByteTokenizer):
    """Counts how often it is asked."""

    calls = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.calls += 1
        return super().encode_batch(texts)


def test_tokens_are_reused_only_for_the_same_text_and_tokenizer(tmp_path: Path) -> None:
    text, folder, tokenizer = tmp_path / "a.txt", tmp_path / "tokens", Counting()
    text.write_text("one two three\n" * 5)
    first = prepare(text, tokenizer, folder)
    assert prepare(str(text), tokenizer, folder) == first
    assert tokenizer.calls == 1
    prepare(text, tokenizer, folder, valid_fraction=0.2)
    assert tokenizer.calls == 2
    text.write_text("one two threw\n" * 5)
    changed = prepare(text, tokenizer, folder, valid_fraction=0.2)
    assert tokenizer.calls == 3
    changed.train.path.write_bytes(b"")
    prepare(text, tokenizer, folder, valid_fraction=0.2)
    assert tokenizer.calls == 4
    assert "threw" in text_of(prepare(text, tokenizer, folder, valid_fraction=0.2).train)
    other = train_bpe(["one two"], 260)
    assert open_tokens(prepare(text, other, folder).train.path)[-1] == other.eos_id


def test_other_folders_are_not_replaced_and_failures_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(LongscanError, match="not written by longscan"):
        prepare(tmp_path / "a.txt", BYTES, tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(LongscanError, match=r"b\.txt is not UTF-8"):
        prepare([tmp_path / "a.txt", tmp_path / "b.txt"], BYTES, tmp_path / "tokens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_damaged_token_files_are_errors(tmp_path: Path) -> None:
    path = token_file(tmp_path, range(10))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LongscanError, match="expected 20 bytes, got 19"):
        TokenDataset(path, 2, 1)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(LongscanError, match="does not describe"):
        open_tokens(path)
    with pytest.raises(LongscanError, match="not of this format"):
        TokenFiles.open(tmp_path)


# Batches.


@pytest.mark.parametrize(("tokens", "seq_len"), [(101, 10), (100, 10), (11, 10), (64, 1), (1000, 7)])
def test_an_epoch_predicts_every_token_once(tokens: int, seq_len: int, tmp_path: Path) -> None:
    dataset = TokenDataset(token_file(tmp_path, range(tokens)), seq_len, batch_size=1, seed=3)
    left_over = set()
    for epoch in range(3):
        first = epoch * dataset.steps_per_epoch
        rows = torch.cat([dataset.batch(first + step) for step in range(dataset.steps_per_epoch)])
        assert rows.dtype == torch.int64
        assert rows.shape == (tokens // seq_len, seq_len + 1)
        assert torch.equal((rows[:, :-1] + 1) % tokens, rows[:, 1:])
        predicted = set(rows[:, 1:].flatten().tolist())
        assert len(predicted) == dataset.tokens_per_epoch == tokens // seq_len * seq_len
        left_over.add(frozenset(range(tokens)) - predicted)
    assert {len(tokens) for tokens in left_over} == {tokens % seq_len}
    assert len(left_over) > 1 or tokens % seq_len == 0


def test_batches_depend_on_seed_and_number_only(tmp_path: Path) -> None:
    path = token_file(tmp_path, range(500))
    dataset = TokenDataset(path, 8, batch_size=5, seed=1)
    batches = [dataset.batch(step) for step in range(40)]  # three epochs; 62 windows are no multiple of 5
    assert dataset.steps_per_epoch == 13
    for step in (39, 12, 0, 25):
        assert torch.equal(TokenDataset(path, 8, batch_size=5, seed=1).batch(step), batches[step])
        assert torch.equal(dataset.batch(step), batches[step])
    rows = torch.cat(batches)
    one = TokenDataset(path, 8, batch_size=1, seed=1)
    assert torch.equal(rows, torch.cat([one.batch(step) for step in range(200)]))
    assert not torch.equal(rows[:62], rows[62:124])
    assert not torch.equal(rows[:62], torch.cat([TokenDataset(path, 8, 62, seed=2).batch(0)]))
    assert rows[:62, 0].tolist() != sorted(rows[:62, 0].tolist())


def test_the_order_is_the_one_that_runs_were_made_with(tmp_path: Path) -> None:
    dataset = TokenDataset(token_file(tmp_path, range(100)), 10, batch_size=4, seed=7)
    assert dataset.batch(0)[:, 0].tolist() == [62, 22, 92, 42]
    assert dataset.batch(1000)[:, 0].tolist() == [60, 20, 70, 80]


def test_a_batch_may_be_larger_than_the_text(tmp_path: Path) -> None:
    dataset = TokenDataset(token_file(tmp_path, range(11)), 10, batch_size=6)
    assert dataset.batch(0).shape == (6, 11)
    assert dataset.steps_per_epoch == 1


def test_short_texts_and_bad_sizes_are_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, range(10))
    with pytest.raises(LongscanError, match=r"has 10 tokens, .* seq_len \+ 1 = 11\. .* at most 9\."):
        TokenDataset(path, 10, 1)
    assert TokenDataset(path, 9, 1).batch(0).shape == (1, 10)
    with pytest.raises(UsageError, match="batch_size"):
        TokenDataset(path, 2, 0)
    with pytest.raises(UsageError, match="seed"):
        TokenDataset(path, 2, 1, seed=-1)
    with pytest.raises(LongscanError, match="has 0 tokens"):
        TokenDataset(token_file(tmp_path, []), 4, 1)


@pytest.mark.parametrize("tokens", [2, 10, 11, 12, 100])
def test_evaluation_windows_predict_every_token_in_order(tokens: int, tmp_path: Path) -> None:
    batches = list(windows(token_file(tmp_path, range(tokens)), 10, batch_size=4))
    assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, tokens))
    assert all(batch.shape[0] <= 4 for batch in batches)
    assert torch.cat([batch[:, 0] for batch in batches]).tolist() == list(range(0, tokens - 1, 10))


def test_a_limited_evaluation_is_spread_evenly(tmp_path: Path) -> None:
    path = token_file(tmp_path, range(205))
    assert [batch[0, 0].item() for batch in windows(path, 10, limit=4)] == [0, 50, 100, 150]
    assert len(list(windows(path, 10, limit=99))) == 21
    with pytest.raises(LongscanError, match="fewer than 2 tokens"):
        list(windows(token_file(tmp_path, [1]), 10))
