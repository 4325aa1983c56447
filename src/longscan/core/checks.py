"""Checks of arguments that Python itself lets pass."""

from __future__ import annotations

import operator
from typing import Any

from longscan.errors import UsageError

__all__ = ["check_text", "check_texts", "check_whole"]


def check_texts(name: str, texts: object) -> None:
    """Refuse one text where several are expected: it would be taken for its characters.

    Args:
        name: of the argument.
        texts: its value.

    Raises:
        UsageError: it is one text.
    """
    if isinstance(texts, str | bytes):
        shown = repr(texts[:40]) + ("..." if len(texts) > 40 else "")
        raise UsageError(f"{name}: expected a list of texts, got one text, {shown}. Put it in a list.")


def check_text(name: str, text: object) -> None:
    """Refuse anything but one text.

    Args:
        name: of the argument.
        text: its value.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(text, str):
        raise UsageError(f"{name}: expected one text, got {type(text).__name__}.")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse anything but a whole number within bounds.

    Args:
        name: of the argument.
        value: its value; numbers of NumPy are welcome.
        least: the smallest one that makes sense.
        most: the largest one; None for no bound.

    Raises:
        UsageError: it is something else.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise UsageError(f"{name}: expected a whole number, got {value!r}.")
    if number < least or (most is not None and number > most):
        bounds = f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
        raise UsageError(f"{name}: expected {bounds}, got {value!r}.")
