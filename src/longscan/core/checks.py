"""Checks of arguments that Python itself lets pass."""

from __future__ import annotations

import operator
from typing import Any

from longscan.errors import LongscanError, UsageError

__all__ = ["check_range", "check_text", "check_texts", "check_whole"]


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
    check_range(name, number, least=least, most=most, error=UsageError)


def check_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    error: type[LongscanError] = LongscanError,
) -> None:
    """Refuse a number outside an interval, NaN included.

    Args:
        name: of the number.
        value: the number.
        least: the smallest allowed value; None for no bound, as in all that follow.
        most: the largest allowed value.
        above: the value has to be larger than this.
        below: the value has to be smaller than this.
        error: what to raise.

    Raises:
        LongscanError: the number is outside; `error`, if that is a subclass.
    """
    inside = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
        and value == value
    )
    if inside:
        return
    if most is not None and least is not None:
        expected = f"{least:,} to {most:,}"
    else:
        bounds = [f"{least:,} or more"] if least is not None else []
        bounds += [f"more than {above:,}"] if above is not None else []
        bounds += [f"at most {most:,}"] if most is not None else []
        bounds += [f"less than {below:,}"] if below is not None else []
        expected = " and ".join(bounds)
    shown = f"{value:,}" if isinstance(value, int) else repr(value)
    raise error(f"{name}: expected {expected}, got {shown}.")
