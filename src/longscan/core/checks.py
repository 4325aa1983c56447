"""Checks of arguments: their types, and the range that a number must lie in."""

from __future__ import annotations

import math
import operator
from typing import Any

from longscan.errors import LongscanError, UsageError

__all__ = ["check_range", "check_text", "check_texts", "check_whole"]


def check_texts(name: str, texts: object) -> None:
    """Raise unless an argument is several texts; a single one would be taken for a list of characters.

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
    """Raise unless an argument is one text.

    Args:
        name: of the argument.
        text: its value.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(text, str):
        raise UsageError(f"{name}: expected one text, got {type(text).__name__}.")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise unless an argument is a whole number in a range.

    Args:
        name: of the argument.
        value: its value; NumPy's integers count too.
        least: the smallest valid number.
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
    check_range(name, number, least=least, most=most, error=UsageError)


def check_range(
    name: str,
    value: float | None,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float | None = None,
    below: float = math.inf,
    error: type[LongscanError] = LongscanError,
) -> None:
    """Raise unless a number lies in a range; None is valid.

    Args:
        name: of the number.
        value: its value.
        least: the smallest valid number.
        above: a bound that the number must exceed.
        most: the largest valid number; None for no bound.
        below: a bound that the number must not reach.
        error: what to raise: a `UsageError` for an argument.

    Raises:
        LongscanError: it is outside, or NaN; `error`, if that is a subclass.
    """
    if value is None or (value >= least and above < value < below and (most is None or value <= most)):
        return
    if least > -math.inf and most is not None:
        expected = f"{_number(least)} to {_number(most)}"
    elif least > -math.inf and below == math.inf:
        expected = f"{_number(least)} or more"
    else:
        bounds = {"at least": least, "more than": above, "at most": most, "below": below}
        expected = " and ".join(
            f"{words} {_number(bound)}"
            for words, bound in bounds.items()
            if bound is not None and math.isfinite(bound)
        )
    raise error(f"{name}: expected {expected}, got {value!r}.")


def _number(bound: float) -> str:
    """Return a bound as text: "1,024", and "2**64 - 1" for the largest of 64 bits."""
    if isinstance(bound, int) and bound > 2**53 and bound & (bound + 1) == 0:
        return f"2**{bound.bit_length()} - 1"
    return f"{bound:,}"
