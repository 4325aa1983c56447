"""Labelled texts: read from tables and JSON lines, encoded for BERT, split into training and validation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longscan.core.random import RandomStream
from longscan.data.documents import JSONL
from longscan.data.sentence_pairs import read_lines
from longscan.data.text_files import text_kind
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers.wordpiece import Framed, WordPieceTokenizer

__all__ = [
    "Example",
    "divide",
    "frame_examples",
    "number_labels",
    "parse_columns",
    "read_examples",
    "read_whole",
]


def read_whole(example: Example) -> str:
    """Return all text of an example."""
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"


class Example(NamedTuple):
    """A labelled text, or pair of texts.

    Attributes:
        label: its class.
        text: never empty.
        pair: the other text of a pair, or None.
        where: file and line, for messages.
    """

    label: str
    text: str
    pair: str | None
    where: str


def parse_columns(columns: str) -> tuple[int, ...]:
    """Return the indices, from 0, of the columns of label, text and perhaps the other text.

    Args:
        columns: numbers from 1, separated by commas.

    Raises:
        UsageError: it is something else.
    """
    numbers = columns.split(",")
    if len(numbers) not in (2, 3) or not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"columns: expected LABEL,TEXT or LABEL,TEXT,PAIR such as 1,2; got {columns!r}.")
    indices = tuple(int(number) - 1 for number in numbers)
    if min(indices) < 0 or len(set(indices)) < len(indices):
        raise UsageError(f"columns: expected different numbers from 1 on, got {columns!r}.")
    return indices


def read_examples(paths: Sequence[str | Path], columns: str = "1,2") -> list[Example]:
    r"""Return labelled texts, in order.

    Args:
        paths: tables with a row per line and columns separated by tabs, without quoting; or .jsonl files of
            {"label": ..., "text": ..., "pair": ...}. UTF-8, also .gz or .xz. Blank lines are skipped.
        columns: of a table, see `parse_columns`. A first row that calls the label column "label" is a header.

    Returns:
        The examples, in order.

    Raises:
        LongscanError: a row with another number of columns, an empty label or text, a bad line; no example.
        OSError: a file can't be read.
    """
    indices = parse_columns(columns)
    examples: list[Example] = []
    for path in map(Path, paths):
        examples += _jsonl(path) if text_kind(path) in JSONL else _table(path, indices)
    for label, text, pair, where in examples:
        if not label.strip() or not text.strip() or (pair is not None and not pair.strip()):
            raise LongscanError(f"{where}: expected a label and a text, got an empty one.")
        if (pair is None) != (examples[0].pair is None):
            raise LongscanError(f"{where}: expected all examples to have a pair, or none of them.")
    if not examples:
        raise LongscanError(
            f"no examples in {', '.join(map(str, paths))}: expected a label and a text a line."
        )
    return examples


def number_labels(examples: Sequence[Example], labels: Sequence[str]) -> list[int]:
    """Return the class index of each example.

    Args:
        examples: labelled texts.
        labels: the labels of the model, in the order of its outputs.

    Raises:
        LongscanError: a label was not in the training data.
    """
    number = {label: index for index, label in enumerate(labels)}
    unseen = Counter(example.label for example in examples if example.label not in number)
    if unseen:
        label, count = unseen.most_common(1)[0]
        where = next(example.where for example in examples if example.label == label)
        known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        raise LongscanError(
            f"{where}: the label {label!r} was not in the training data, which had {known} "
            f"({count:,} such rows{f', {len(unseen)} such labels' if len(unseen) > 1 else ''}). "
            "Correct the label, leave these rows out, or train again with them."
        )
    return [number[example.label] for example in examples]


def frame_examples(
    tokenizer: WordPieceTokenizer, examples: Sequence[Example], max_length: int
) -> list[Framed]:
    """Return texts and pairs as framed ids; see `WordPieceTokenizer.frame_batch`.

    Args:
        tokenizer: the model's.
        examples: of `read_examples`.
        max_length: the most tokens, [CLS] and [SEP] included.
    """
    pairs = [example.pair for example in examples if example.pair is not None]
    return tokenizer.frame_batch([example.text for example in examples], pairs or None, max_length)


def divide(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return training and validation examples, stratified by class; the split is always the same.

    Args:
        examples: labelled texts.
        share: fraction of each class to hold out, rounded down.
    """
    left = {label: int(share * count) for label, count in Counter(e.label for e in examples).items()}
    held = set()
    for number in RandomStream(0, 0).permutation(len(examples)).tolist():
        if left[examples[number].label] > 0:
            left[examples[number].label] -= 1
            held.add(number)
    train = [example for number, example in enumerate(examples) if number not in held]
    return train, [examples[number] for number in sorted(held)]


def _table(path: Path, indices: tuple[int, ...]) -> Iterator[Example]:
    """Yield the rows of a table."""
    width = 0
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        row = line.removesuffix("\r").split("\t")
        if width == 0:
            width = len(row)
            if width <= max(indices):
                raise LongscanError(
                    f"{path}:{number}: expected at least {max(indices) + 1} columns separated by tabs, got "
                    f"{width}. Give the columns of label and text with --columns."
                )
            if row[indices[0]].strip(' "').lower() == "label":
                continue
        if len(row) != width:
            raise LongscanError(
                f"{path}:{number}: expected {width} columns as in the rows before, got {len(row)}. "
                "A text with tabs in it needs the .jsonl form."
            )
        yield _example([row[index] for index in indices], f"{path}:{number}")


def _jsonl(path: Path) -> Iterator[Example]:
    """Yield the lines of a .jsonl file."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LongscanError(f"{where}: not JSON ({error}); expected an object a line.") from error
        fields = value if isinstance(value, dict) else {}
        label, text, pair = (fields.get(name) for name in ("label", "text", "pair"))
        if not isinstance(label, str | int) or not isinstance(text, str) or not isinstance(pair, str | None):
            raise LongscanError(f'{where}: expected {{"label": "...", "text": "..."}}, got {line[:200]}')
        try:
            f"{label}{text}{pair}".encode()
        except UnicodeEncodeError as error:
            raise LongscanError(f"{where}: half of a surrogate pair ({error}).") from error
        yield _example([str(label), text, *([] if pair is None else [pair])], where)


def _example(values: Sequence[str], where: str) -> Example:
    """Return the example of a row."""
    label, text, *pair = values
    return Example(label.strip(), text, pair[0] if pair else None, where)
