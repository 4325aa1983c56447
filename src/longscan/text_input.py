"""Texts for the verbs that read them one a line, and what becomes of those that are too long."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from longscan.config import count
from longscan.generate import utf8
from longscan.wordpiece import Framed

__all__ = ["read_stdin", "tell_cut"]


def read_stdin() -> list[str]:
    """Return the lines of stdin.

    Raises:
        LongscanError: they are not UTF-8.
    """
    text = utf8(sys.stdin.buffer.read(), "stdin").removeprefix("\ufeff").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def tell_cut(framed: Sequence[Framed]) -> None:
    """Say on stderr that texts were cut, if some were.

    Args:
        framed: the texts.
    """
    if n_cut := sum(one.cut > 0 for one in framed):
        longest = max(len(one.ids) for one in framed)
        cut = f"{n_cut:,} of {count(len(framed), 'text')} {'was' if n_cut == 1 else 'were'} cut"
        typer.echo(f"{cut} at {count(longest, 'token')}", err=True)
