"""Frozen dataclasses that are stored as JSON and reject unknown fields, and the wording of messages."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from longscan.core.checks import check_range
from longscan.errors import LongscanError, UsageError

__all__ = ["Config", "brief", "count", "nearest"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration: subclasses are `@dataclass(frozen=True, kw_only=True)` and add fields.

    Fields are bool, int, float, str, Literal, tuple, another Config, or a union of these. A subclass checks
    the ranges of its values with `check_range` in `__post_init__`, after `super().__post_init__()`, which
    checks their types.
    """

    def __post_init__(self) -> None:
        """Check the types, and convert without loss: a list to a tuple, an int to a float.

        Raises:
            LongscanError: a value has the wrong type.
        """
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            fitted = _check(f"{type(self).__name__}.{name}", value, hint)
            if fitted is not value:
                object.__setattr__(self, name, fitted)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Self:
        """Return a configuration made of plain values, as read from JSON.

        Args:
            mapping: field name -> value. Fields with a default may be missing; lists stand for tuples,
                dictionaries for nested configurations, integers for floats.

        Returns:
            The configuration.

        Raises:
            LongscanError: a key is unknown, a required one is missing, or a value has the wrong type.
        """
        if not isinstance(mapping, Mapping):
            raise LongscanError(f"{cls.__name__}: expected a dictionary of fields, got {_show(mapping)}.")
        known = {field.name: field for field in fields(cls) if field.init}
        for key in mapping:
            if key not in known:
                raise LongscanError(f"{cls.__name__} has no field {key!r}{nearest(key, known)}")
        missing = [
            name
            for name, field in known.items()
            if name not in mapping and field.default is MISSING and field.default_factory is MISSING
        ]
        if missing:
            raise LongscanError(f"{cls.__name__} needs {', '.join(missing)}: add them.")
        hints = _hints(cls)
        return cls(
            **{key: _check(f"{cls.__name__}.{key}", value, hints[key]) for key, value in mapping.items()}
        )

    def check(self, *names: str, **bounds: float) -> None:
        """Check the ranges of numbers; a field that is None passes.

        Args:
            names: the fields.
            bounds: least, most, above or below; see `check_range`. At least 1 if there are none.

        Raises:
            UsageError: a value is out of range.
        """
        for name in names:
            check_range(name, getattr(self, name), error=UsageError, **(bounds or {"least": 1}))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON values, from which `from_dict` makes an equal one."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.init}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like `from_dict`.

        Args:
            changes: field name -> new value.

        Returns:
            The changed copy.

        Raises:
            LongscanError: as `from_dict`.
        """
        current = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        return self.from_dict({**current, **changes})


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the most similar known one, or all of them.

    A name that differs only in the number at its end is no typing error: mamba2 is another model than mamba.

    Args:
        name: the unknown name.
        known: the valid ones.

    Returns:
        "; did you mean ...?" or "; known: a, b, c.".
    """
    names = sorted(known)
    stem = re.sub(r"\d+$", "", str(name))
    choice = [each for each in names if stem == name or re.sub(r"\d+$", "", each) != stem]
    close = difflib.get_close_matches(str(name), choice, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}."


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun.

    Args:
        n: the number.
        noun: in the singular.
        plural: the plural; `noun` and an s if None.

    Returns:
        "1 step", "2 steps", "1,000 steps".
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def brief(value: float, digits: int = 3) -> str:
    """Return a number with a few significant digits, but never in scientific notation if it is large.

    Args:
        value: the number.
        digits: significant ones.
    """
    short = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in short else short


_HINTS: dict[
    type[Any], dict[str, Any]
] = {}  # cached: resolving annotations takes a hundred times as long as the check


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Return the types of the fields that a constructor takes."""
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {field.name: hints[field.name] for field in fields(cls) if field.init}
    return _HINTS[cls]


class _MismatchError(Exception):
    """A value does not fit a type; the caller adds the field's name."""


def _check(field: str, value: Any, hint: Any) -> Any:
    """Return `value` converted to the type `hint`; the error names `field`."""
    try:
        return _fit(value, hint)
    except _MismatchError:
        raise LongscanError(f"{field}: expected {_name(hint)}, got {_show(value)}.") from None


def _fit(value: Any, hint: Any) -> Any:
    """Return `value` converted to `hint` without loss; raise _MismatchError otherwise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return _fit(value, alternative)
            except _MismatchError:
                continue
        raise _MismatchError
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _MismatchError
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _MismatchError
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise _MismatchError
        return tuple(_fit(item, kind) for item, kind in zip(value, arguments, strict=True))
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    return _fit_scalar(value, hint)


def _fit_scalar(value: Any, hint: Any) -> Any:
    """Return the same for bool, int, float, str and None."""
    if type(value) is hint and hint is not float:
        return value
    if isinstance(value, bool):  # a subclass of int
        raise _MismatchError
    if hint is int and isinstance(value, numbers.Integral):  # NumPy's too
        return int(value)
    if hint is float and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:
            raise _MismatchError from None
        if not math.isfinite(number):
            raise _MismatchError
        return number
    raise _MismatchError


def _plain(value: Any) -> Any:
    """Return a field's value as a JSON value."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _name(hint: Any) -> str:
    """Return the name of a type for users who may not write Python."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_name(arguments[0])}"
        return f"a list of {len(arguments)} ({', '.join(_name(argument) for argument in arguments)})"
    return _PLAIN_NAMES.get(hint, str(hint))


_PLAIN_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "int",
    float: "a finite number",
    str: "text",
    types.NoneType: "null",
}


def _show(value: Any) -> str:
    """Return a value, shortened, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
