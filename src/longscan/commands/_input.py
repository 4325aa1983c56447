"""What verbs take in: texts, one per line, a warning about those that are too long, and sampling settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from longscan.core.config import count
from longscan.core.files import read_json, utf8
from longscan.errors import LongscanError, UsageError

if TYPE_CHECKING:
    from longscan.inference.sampling import Constraint, SamplingConfig
    from longscan.tokenizers.base import Tokenizer
    from longscan.tokenizers.wordpiece import Framed

__all__ = ["read_constraint", "read_prompts", "read_stdin", "sampling_config", "warn_of_cut"]


def read_constraint(
    tokenizer: Tokenizer, schema: Path | None, regex: str | None
) -> Callable[[], Constraint] | None:
    """Return what texts must follow, or None if nothing is given.

    Args:
        tokenizer: of the model.
        schema: a file with a JSON schema.
        regex: a regular expression.

    Raises:
        LongscanError: the file is none, or what is given is no grammar.
        OSError: the file can't be read.
    """
    from longscan.inference.grammar import Grammars

    if schema is not None:
        return Grammars(tokenizer).json_schema(read_json(schema))
    return None if regex is None else Grammars(tokenizer).regex(regex)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file.

    Args:
        path: one prompt per line, or .jsonl of {"prompt": ...}; UTF-8, also .gz or .xz. Blank lines are
            skipped.

    Returns:
        At least one.

    Raises:
        LongscanError: a line is not of this form, or there is none.
        OSError: it can't be read.
    """
    from longscan.data.documents import JSONL  # not for prompts that are arguments
    from longscan.data.sentence_pairs import read_lines
    from longscan.data.text_files import text_kind

    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(read_lines(path), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise LongscanError(f"{path}: expected one prompt per line, got none.")
    if text_kind(path) not in JSONL:
        return [line for _, line in lines]
    prompts = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LongscanError(
                f"{path}:{number}: not JSON ({error}); expected one JSON object per line."
            ) from error
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(prompt, str):
            raise LongscanError(f'{path}:{number}: expected {{"prompt": "..."}}, got {line[:200]}')
        prompts.append(prompt)
    return prompts


def read_stdin() -> list[str]:
    """Return the lines of stdin.

    Raises:
        LongscanError: they are not UTF-8.
    """
    text = utf8(sys.stdin.buffer.read(), "stdin").removeprefix("\ufeff").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def warn_of_cut(framed: Sequence[Framed]) -> None:
    """Print to stderr how many texts were cut, if any were.

    Args:
        framed: the texts.
    """
    if n_cut := sum(one.cut > 0 for one in framed):
        longest = max(len(one.ids) for one in framed)
        cut = f"{n_cut:,} of {count(len(framed), 'text')} {'was' if n_cut == 1 else 'were'} cut"
        typer.echo(f"{cut} at {count(longest, 'token')}", err=True)


def sampling_config(**fields: Any) -> SamplingConfig:
    """Return the sampling settings of flags.

    Args:
        fields: of `SamplingConfig`.

    Raises:
        UsageError: a value is out of range.
    """
    from longscan.inference.sampling import SamplingConfig  # which other verbs need not load

    try:
        return SamplingConfig.from_dict(fields)
    except LongscanError as error:
        raise UsageError(str(error)) from error
