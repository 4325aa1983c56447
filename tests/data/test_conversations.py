"""Rows of every known form, those that are none, and examples packed into rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longscan.data.conversations import Row, divide, read_directory, read_rows
from longscan.data.examples import (
    IGNORE,
    Example,
    collate,
    load_examples,
    pack,
    save_examples,
    shorten,
)
from longscan.errors import LongscanError
from longscan.models import MODELS

ASK = {"role": "user", "content": "Why?"}
TELL = {"role": "assistant", "content": "So."}
FORMS: dict[str, tuple[dict[str, Any], Row]] = {
    "messages": ({"messages": [ASK, TELL], "id": 7}, Row([ASK, TELL], "", "", None, "")),
    "tools": ({"messages": [ASK, TELL], "tools": [{"a": 1}]}, Row([ASK, TELL], "", "", [{"a": 1}], "")),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, TELL]},
        Row([ASK, TELL], "", "", None, ""),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        Row([ASK, TELL], "", "", None, ""),
    ),
    "Alpaca": ({"instruction": "Why?", "input": "", "output": "So."}, Row([ASK, TELL], "", "", None, "")),
    "Alpaca with input": (
        {"instruction": "Why?", "input": "It.", "output": "So."},
        Row([{"role": "user", "content": "Why?\n\nIt."}, TELL], "", "", None, ""),
    ),
    "ShareGPT with system and tools": (
        {"conversations": [{"from": "Human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
        | {"system": "Be.", "tools": '[{"a": 1}]'},
        Row([{"role": "system", "content": "Be."}, ASK, TELL], "", "", [{"a": 1}], ""),
    ),
    "Alpaca with history": (
        {"instruction": "Why?", "input": " ", "output": "So.", "history": [["Why?", "So."]]},
        Row([ASK, TELL, ASK, TELL], "", "", None, ""),
    ),
    "a call": (
        {"messages": [ASK, {**TELL, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]},
        Row(
            [ASK, {**TELL, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}],
            *("", "", None, ""),
        ),
    ),
    "weights": (
        {"messages": [ASK, {**TELL, "weight": 0}]},
        Row([ASK, {**TELL, "weight": 0}], "", "", None, ""),
    ),
    "completion": ({"prompt": "Why?", "completion": " So."}, Row(None, "Why?", " So.", None, "")),
    "completion of messages": (
        {"prompt": [ASK], "completion": [TELL]},
        Row([ASK, TELL], "", "", None, ""),
    ),
    "text": ({"text": "So it goes."}, Row(None, "", "So it goes.", None, "")),
}
BAD: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1]", "expected an object, got list"),
    "NaN": ('{"text": NaN}', "NaN"),
    "deep": ('{"text": ' + "[" * 70 + "]" * 70 + "}", "deeper"),
    "very deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "JSON"),
    "surrogate": ('{"text": "\\ud800"}', "surrogate"),
    "nothing known": ('{"a": 1, "b": 2}', "got a, b"),
    "empty": ("{}", "got no keys"),
    "preferences": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "not trained on"),
    "no list": ('{"messages": "hello"}', "list of messages, got str"),
    "no messages": ('{"messages": []}', "got nothing"),
    "role": ('{"messages": [{"role": "robot", "content": "x"}]}', "got 'robot'"),
    "content": ('{"messages": [{"role": "user", "content": 3}]}', "expected text, got int"),
    "image": ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "parts of text"),
    "calls": ('{"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]}', "expected calls"),
    "weight": (
        '{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}',
        "weight: expected 0 or 1",
    ),
    "history": ('{"instruction": "x", "output": "y", "history": ["z"]}', "history: expected pairs"),
    "prompt": ('{"prompt": 1, "completion": "x"}', "prompt: expected text"),
    "completion": ('{"prompt": "x", "completion": ""}', "completion: expected text, got none"),
    "blank text": ('{"text": "  "}', "text: expected text, got none"),
    "tools": ('{"messages": [{"role": "user", "content": "x"}], "tools": {}}', "tools: expected a list"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    value, expected = FORMS[form]
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(value) + "\n")
    rows, faults = read_rows([tmp_path / "rows.jsonl"])
    assert not faults
    assert rows == [expected._replace(where=f"{tmp_path / 'rows.jsonl'}:2")]


@pytest.mark.parametrize("form", BAD)
def test_rows_that_are_none_are_named(form: str, tmp_path: Path) -> None:
    line, words = BAD[form]
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    rows, faults = read_rows([tmp_path / "rows.jsonl"])
    assert [row.completion for row in rows] == ["good"]
    (fault,) = faults
    assert fault.startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert words in fault


def test_plain_text_and_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once.\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "Twice."}')
    rows, faults = read_rows([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"])
    assert [row.completion for row in rows] == ["Once.\n", "Twice."]
    assert not faults


def test_a_directory_has_its_own_validation(tmp_path: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "train.txt").write_text("another file of this name")
    others = [tmp_path / "test.jsonl", tmp_path / "train.txt"]
    assert read_directory(tmp_path) == ([tmp_path / "train.jsonl"], [tmp_path / "validation.jsonl"], others)
    (tmp_path / "train.jsonl").rename(tmp_path / "other.jsonl")
    assert len(read_directory([tmp_path]).train) == 4
    with pytest.raises(LongscanError, match="no such file"):
        read_directory(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("n", "fraction", "held"),
    [(1, 0.5, 0), (9, 0.05, 0), (10, 0.05, 1), (200, 0.05, 10), (4, 0.99, 3), (30, 0, 0)],
)
def test_what_is_held_out(n: int, fraction: float, held: int) -> None:
    rows = [Row(None, "", str(i), None, "") for i in range(n)]
    train, valid = divide(rows, fraction)
    assert len(valid) == held
    assert sorted(train + valid) == sorted(rows)
    assert divide(rows, fraction) == (train, valid)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 90))
def test_packing_places_everything_once_and_wastes_little(lengths: list[int], seq_len: int) -> None:
    rows = pack(lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= seq_len
    assert sum(2 * load <= seq_len for load in loads) <= 1  # two half empty rows would be one


def examples(count: int = 7, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(draw.integers(2, 12))
        trained = draw.random(n) < 0.5
        trained[-1] = True
        made.append(Example(draw.integers(0, 100, n).astype(np.int32), trained))
    return made


def test_a_packed_row_is_its_examples_each_by_itself() -> None:
    """Loss and gradients of one packed batch are those of the examples one by one."""
    entry = MODELS["mamba"]
    model = entry.cls(
        entry.config.from_dict(entry.presets["tiny"]), torch.Generator().manual_seed(0)
    ).double()
    some = examples()
    rows = [[some[i] for i in row] for row in pack([len(one.ids) for one in some], 24)]
    assert len(rows) < len(some)
    batch = collate(rows)
    learnt = sum(one.learnt for one in some)
    whole = model(batch.ids, seq_idx=batch.seq_idx, labels=batch.labels, return_logits=False).loss * learnt
    total = torch.zeros((), dtype=torch.float64)
    for one in some:
        ids, labels = torch.from_numpy(one.ids).long()[None], torch.from_numpy(one.ids).long()[None]
        labels = labels.masked_fill(~torch.from_numpy(one.trained)[None], IGNORE)
        total = total + model(ids, labels=labels).loss * one.learnt
    torch.testing.assert_close(whole, total, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    for ours, expected in zip(
        torch.autograd.grad(whole, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-11)


def test_long_examples(tmp_path: Path) -> None:
    long = Example(np.arange(10, dtype=np.int32), np.ones(10, np.bool_))
    pieces = shorten(long, 4, running=True)
    assert [piece.ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert sum(piece.learnt for piece in pieces) == long.learnt == 9
    assert [piece.ids.tolist() for piece in shorten(long, 4, running=False)] == [[0, 1, 2, 3]]
    late = Example(long.ids, np.arange(10) >= 6)
    assert shorten(late, 4, running=False) == []
    one = Example(np.array([5], np.int32), np.array([True]))
    assert shorten(one, 4, running=True) == []  # nothing predicts it


def test_examples_survive_a_file_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    for some in (examples(), []):
        save_examples(tmp_path / "x.safetensors", some)
        again = load_examples(tmp_path / "x.safetensors")
        assert len(again) == len(some)
        for ours, theirs in zip(again, some, strict=True):
            assert np.array_equal(ours.ids, theirs.ids)
            assert np.array_equal(ours.trained, theirs.trained)
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    with pytest.raises(LongscanError, match="damaged"):
        load_examples(tmp_path / "x.safetensors")
