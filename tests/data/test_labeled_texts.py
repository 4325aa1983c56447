"""Labelled texts: tables, JSON lines, and what is held out of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from longscan.core.random import RandomStream
from longscan.data.batching import shuffled
from longscan.data.labeled_texts import divide, parse_columns, read_examples
from longscan.errors import LongscanError, UsageError

GOOD, BAD = "a fine warm lovely film", "a poor cold dreadful film"
ROWS = [("good", f"{GOOD} number {n}") for n in range(20)] + [("bad", f"{BAD} number {n}") for n in range(20)]


def table(path: Path, rows: list[tuple[str, ...]] = ROWS) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tables_and_json_lines(tmp_path: Path) -> None:
    plain = read_examples([table(tmp_path / "a.tsv", [("label", "text"), ("x", "one"), ("y", 'a "quote')])])
    assert [(e.label, e.text, e.pair) for e in plain] == [("x", "one", None), ("y", 'a "quote', None)]
    assert plain[0].where == f"{tmp_path / 'a.tsv'}:2"
    wide = read_examples([table(tmp_path / "b.tsv", [("train", "x", "3.5", "one")])], columns="2,4")
    assert [(e.label, e.text) for e in wide] == [("x", "one")]
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"label": 1, "text": "with\\ttab"}\n\n{"label": "2", "text": "b"}\n')
    assert [(e.label, e.text) for e in read_examples([tmp_path / "c.jsonl.gz"])] == [
        ("1", "with\ttab"),
        ("2", "b"),
    ]
    (tmp_path / "d.jsonl").write_text(
        '{"label": "1", "text": "a"}\n{"label": "1", "text": "a", "pair": "b"}\n'
    )
    with pytest.raises(LongscanError, match=r"d\.jsonl:2: expected all examples to have a pair"):
        read_examples([tmp_path / "d.jsonl"])


@pytest.mark.parametrize("columns", ["", "1", "0,1", "1,1", "a,b", "1,2,3,4", "1,-2"])
def test_impossible_columns(columns: str) -> None:
    with pytest.raises(UsageError, match="columns: expected"):
        parse_columns(columns)


def test_every_class_is_held_out_alike(tmp_path: Path) -> None:
    examples = read_examples([table(tmp_path / "a.tsv")])
    kept, held = divide(examples, 0.25)
    assert sorted(e.label for e in held) == ["bad"] * 5 + ["good"] * 5
    assert sorted([*kept, *held]) == sorted(examples)
    assert divide(examples, 0.25) == (kept, held)
    assert divide(examples, 0.0) == (examples, [])


def test_batches_hold_every_example_once_and_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 1000).tolist()
    batches = shuffled(lengths, 8, RandomStream(0, 3))
    assert sorted(n for batch in batches for n in batch) == list(range(1000))
    assert len(batches) == 125
    spread = [max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches]
    assert np.mean(spread) < 10
    assert batches == shuffled(lengths, 8, RandomStream(0, 3))
    assert batches != shuffled(lengths, 8, RandomStream(0, 4))
    assert batches != shuffled(lengths, 8, RandomStream(1, 3))
    assert [len(batch) for batch in shuffled(lengths[:3], 2, RandomStream(0, 0))] in ([2, 1], [1, 2])


@pytest.mark.parametrize("header", ["label\ttext", "Label\ttext\r", '"label"\t"text"', "\ufefflabel\ttext"])
def test_a_header_is_no_example(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(f"{header}\npos\tgood\n".encode())
    assert [example[:2] for example in read_examples([tmp_path / "a.tsv"])] == [("pos", "good")]
