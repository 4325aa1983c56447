"""From rows to tokens: what `longscan finetune` trains on, prepared once and saved with the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longscan.core.config import count
from longscan.core.files import atomic_directory, read_json, write_json
from longscan.data.conversations import Row, divide, read_directory, read_rows
from longscan.data.examples import Example, load_examples, save_examples, shorten
from longscan.errors import LongscanError
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, find_template
from longscan.tokenizers.chat_spans import Ends, Span, spans
from longscan.training.finetune_config import FinetuneConfig

__all__ = ["Data", "prepare", "read"]

META = (
    "conversations",
    "texts",
    "rows",
    "invalid",
    "cut",
    "skipped",
    "template",
    "ends",
    "notes",
    "first_faults",
)
SHOWN = 3  # faults in an error
LONGEST = 64  # characters of a token, more or less: what lies further back is cut off in any case


class Data(NamedTuple):
    """What a run trains on.

    Attributes:
        train: examples.
        valid: those held out.
        meta: counts for the first lines of a run.
    """

    train: list[Example]
    valid: list[Example]
    meta: dict[str, Any]


class _Counts:
    """What was counted while examples were made."""

    def __init__(self) -> None:
        self.rows = self.cut = self.skipped = 0
        self.faults: list[str] = []


def prepare(
    config: FinetuneConfig, directory: Path, tokenizer: Tokenizer, progress: Callable[[int, int], None]
) -> None:
    """Write the examples of a run.

    Args:
        config: its settings.
        directory: of the prepared data; new.
        tokenizer: of the model.
        progress: called with the rows done and their number.

    Raises:
        UsageError: there is no such chat template.
        LongscanError: a file is damaged or not there, a row is none, or nothing is left to learn.
        OSError: a file can't be read.
    """
    files, others, ignored = read_directory(config.data)
    others += read_directory(config.valid).train if config.valid else []
    held = {file.resolve() for file in others}
    parts = [read_rows([file for file in files if file.resolve() not in held]), read_rows(others)]
    counts = _Counts()
    counts.faults = [fault for part in parts for fault in part.faults]
    rows, held_out = parts[0].rows, parts[1].rows
    if not others:
        rows, held_out = divide(rows, config.valid_fraction) if len(rows) > 1 else (rows, [])
    chat = find_template(tokenizer, config.template)
    total = len(rows) + len(held_out)
    notes = [f"{file} is left out: train.jsonl and valid.jsonl count" for file in ignored[:SHOWN]]
    if any(row.messages for row in (*rows, *held_out)) and not chat.own and config.template is None:
        notes.append(
            "the tokenizer has no chat template, so conversations have the plain one; see --template"
        )
    maker = _Maker(config, tokenizer, chat, counts)
    made: list[list[Example]] = []
    for part in (rows, held_out):
        made.append([])
        for row in part:
            made[-1] += maker.examples(row)
            counts.rows += 1
            progress(counts.rows, total)
    _refuse(counts, config.skip_invalid)
    if not made[0]:
        raise LongscanError(_nothing(config, files, counts, len(rows)))
    with atomic_directory(directory) as folder:
        for name, examples in zip(("train", "valid"), made, strict=True):
            save_examples(folder / f"{name}.safetensors", examples)
        meta = {
            "conversations": sum(row.messages is not None for row in (*rows, *held_out)),
            "texts": sum(row.messages is None and not row.prompt for row in (*rows, *held_out)),
            "rows": total,
            "invalid": len(counts.faults),
            "cut": counts.cut,
            "skipped": counts.skipped,
            "template": chat.name,
            "ends": list(maker.ends) if maker.ends else [list(tokenizer.eos_ids), []],
            "notes": notes,
            "first_faults": counts.faults[:SHOWN],
        }
        write_json(folder / "meta.json", meta)


def read(directory: Path) -> Data:
    """Return what `prepare` wrote.

    Args:
        directory: of the prepared data.

    Raises:
        LongscanError: it is damaged.
        OSError: it can't be read.
    """
    train, valid = (load_examples(directory / f"{name}.safetensors") for name in ("train", "valid"))
    meta = read_json(directory / "meta.json")
    if missing := [name for name in META if name not in meta]:
        raise LongscanError(f"{directory / 'meta.json'} is damaged: it lacks {missing[0]}. Start a new run.")
    return Data(train, valid, meta)


class _Maker:
    """Turns rows into examples."""

    def __init__(
        self, config: FinetuneConfig, tokenizer: Tokenizer, chat: ChatTemplate, counts: _Counts
    ) -> None:
        self.config, self.tokenizer, self.chat, self.counts = config, tokenizer, chat, counts
        self.ends: Ends | None = None

    def examples(self, row: Row) -> list[Example]:
        """Return the examples of a row; what is wrong with it is counted."""
        try:
            if row.messages is None:
                whole = [self._encode(self._text(row))]
            else:
                self.ends = self.ends or Ends(*self.chat.ends(self.tokenizer))
                tools = {"tools": row.tools} if row.tools else {}
                most = LONGEST * self.config.seq_len
                found = spans(self.chat, self.tokenizer, row.messages, self.ends, most, **tools)
                whole = [self._encode(one) for one in found]
        except LongscanError as error:
            self.counts.faults.append(f"{row.where}: {error}")
            return []
        running = row.messages is None and not row.prompt
        seq_len, too_long = self.config.seq_len, self.config.too_long
        examples = []
        for example in whole:
            longer = len(example.ids) > seq_len and not running
            if longer and too_long == "error":
                raise LongscanError(
                    f"{row.where}: expected at most --seq-len {seq_len:,} tokens, got {len(example.ids):,}. "
                    "Raise it, or choose --too-long cut or skip."
                )
            pieces = [] if longer and too_long == "skip" else shorten(example, seq_len, running)
            self.counts.skipped += not pieces
            self.counts.cut += longer and bool(pieces)
            examples += pieces
        return examples

    def _text(self, row: Row) -> list[Span]:
        """Return a text, or a prompt and its completion, as spans."""
        begin, end = self.tokenizer.start, self.tokenizer.eos_id
        completion = Span([row.completion, end], True)
        return [Span([*begin, *([row.prompt] if row.prompt else [])], False), completion]

    def _encode(self, parts: Sequence[Span]) -> Example:
        """Return spans as tokens; text is encoded span by span, as at inference."""
        texts = [piece for pieces, _ in parts for piece in pieces if isinstance(piece, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        ids: list[int] = []
        trained: list[bool] = []
        for pieces, learnt in parts:
            for piece in pieces:
                tokens = next(encoded) if isinstance(piece, str) else [piece]
                ids += tokens
                trained += [learnt or self.config.train_on == "all"] * len(tokens)
        return Example(np.array(ids, np.int32), np.array(trained, np.bool_))


def _nothing(config: FinetuneConfig, files: Sequence[Path], counts: _Counts, n_rows: int) -> str:
    """Return why there is nothing to learn."""
    where = ", ".join(config.data)
    if not n_rows and not counts.faults:
        held = "all of it is in --valid" if config.valid and files else "there are no rows"
        return f"nothing to learn in {where}: {held}. Add examples."
    shown = "".join(f"\n  {fault}" for fault in counts.faults[:SHOWN])
    late = f"{counts.skipped:,} with nothing to learn in the first {config.seq_len:,} tokens"
    rows = count(n_rows + len(counts.faults) * (not n_rows), "row")
    return f"nothing to learn in {where}: of {rows}, {late}, {len(counts.faults):,} not valid.{shown}"


def _refuse(counts: _Counts, skip_invalid: bool) -> None:
    """Raise if rows are none, unless they are to be left out."""
    if not counts.faults or skip_invalid:
        return
    shown = "\n".join(f"  {fault}" for fault in counts.faults[:SHOWN])
    more = f"\n  and {len(counts.faults) - SHOWN:,} more" if len(counts.faults) > SHOWN else ""
    raise LongscanError(
        f"{count(len(counts.faults), 'row')} can't be trained on:\n{shown}{more}\n"
        "Correct them, or leave them out with --skip-invalid."
    )
