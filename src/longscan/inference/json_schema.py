"""JSON schemas and regular expressions of strangers, checked before a grammar is made of them.

A grammar of a few bytes can take a machine's memory: (a{1000}){1000}, or multiples of 123456789. Sizes have
limits. A keyword that a grammar ignores would promise what it does not hold, so unknown ones are errors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from longscan.errors import LongscanError

__all__ = ["GrammarError", "check_regex", "json_rule"]

MAX_BYTES = 64 << 10  # of a schema
MAX_DEPTH = 32  # of schemas inside schemas
MAX_PROPERTIES = 256  # in all: the parser has a limit of its own where all are optional
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SMALLEST, LARGEST = 1e-9, 2.0**53  # of them, but 0: beyond, bounds are rounded or cut
MAX_VALUES = 1000  # of enum, in all
MAX_REGEX = 4096  # characters
MAX_EXPANDED = 20_000  # characters of a regular expression whose bounded repetitions are written out
MAX_MULTIPLE = 10_000  # the states of an automaton of multiples

NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
LISTED = ("anyOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties")
PLAIN = (
    *("type", "enum", "const", "format", "pattern", "minLength", "maxLength", "minimum", "maximum"),
    *("exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "maxProperties"),
    *("required", "$ref"),
)
NOTES = (  # what says nothing of the values
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "contentMediaType", "contentEncoding"),
)
# llguidance's settings: white space as Python's json writes it, or none, as a model could write it for ever
STYLE = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}


class GrammarError(LongscanError):
    """A grammar is at fault, or a text cannot follow it any further."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the values of a JSON schema as a rule of a Lark grammar, after a check.

    Args:
        schema: of JSON Schema 2020-12, as far as PLAIN, LISTED, NAMED and SINGLE go.

    Raises:
        GrammarError: a keyword is unknown, or the schema is too large.
    """
    if not isinstance(schema, Mapping):
        raise GrammarError(f"the JSON schema: expected an object, got {type(schema).__name__}.")
    found = list(_schemas(schema, "the JSON schema", 1))
    try:
        text = json.dumps({**schema, "x-guidance": STYLE}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema: expected JSON values ({error}).") from error
    if len(text) > MAX_BYTES:
        raise GrammarError(f"the JSON schema: expected at most {MAX_BYTES:,} bytes, got {len(text):,}.")
    _check_number("properties", sum(len(one["properties"]) for one in found if "properties" in one))
    _check_number("enum", sum(len(one["enum"]) for one in found if "enum" in one))
    multiples = [one["multipleOf"] for one in found if "multipleOf" in one]
    if multiples and _common(multiples) > MAX_MULTIPLE:
        raise GrammarError(
            f"multipleOf: expected a common multiple of at most {MAX_MULTIPLE:,} last digits, got more."
        )
    return f"%json {text}"


def _check_number(keyword: str, n: int) -> None:
    """Raise if a schema has too many of something."""
    most = MAX_PROPERTIES if keyword == "properties" else MAX_VALUES
    if n > most:
        raise GrammarError(f"{keyword}: expected at most {most:,} in a JSON schema, got {n:,}.")


def _schemas(schema: Any, where: str, depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all inside it, each with its keywords checked."""
    if depth > MAX_DEPTH:
        raise GrammarError(f"the JSON schema: expected at most {MAX_DEPTH} levels.")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{where[:200]}: expected a JSON schema, got {type(schema).__name__}.")
    for keyword in schema:
        if keyword not in (*PLAIN, *NAMED, *LISTED, *SINGLE, *NOTES):
            raise GrammarError(
                f"{where[:200]}: the keyword {str(keyword)[:80]!r} is not supported. Leave it out, or "
                "express the schema without it."
            )
    _check_values(schema, where)
    yield schema
    inside: list[tuple[str, Any]] = [(keyword, schema[keyword]) for keyword in SINGLE if keyword in schema]
    for keyword in (*NAMED, *LISTED):
        value, kind = schema.get(keyword), dict if keyword in NAMED else list
        if value is not None and not isinstance(value, kind):
            raise GrammarError(f"{where[:200]}, {keyword}: expected schemas, got {type(value).__name__}.")
        pairs = value.items() if isinstance(value, dict) else enumerate(value or ())
        inside += [(f"{keyword}.{name}", one) for name, one in pairs]
    for name in schema.get("patternProperties", ()):
        check_regex(name)
    for name, one in inside:
        yield from _schemas(one, f"{where}, {name}", depth + 1)


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    """Raise unless the values of keywords are of their types."""
    pattern, multiple, values = (schema.get(key) for key in ("pattern", "multipleOf", "enum"))
    if pattern is not None:
        check_regex(pattern)
    if "$ref" in schema and not re.fullmatch(r"#|#/(\$defs|definitions|properties)/.*", str(schema["$ref"])):
        raise GrammarError(
            f"{where[:200]}, $ref: expected a reference inside the schema, as in #/$defs/name, "
            f"got {schema['$ref']!r:.80}."
        )
    for name in BOUNDS:
        bound = schema.get(name)
        if isinstance(bound, int | float) and bound and not SMALLEST <= abs(bound) <= LARGEST:
            raise GrammarError(
                f"{where[:200]}, {name}: expected 0 or a number between {SMALLEST:g} and 2^53, either sign, "
                f"got {bound!r:.80}."
            )
    if values is not None and not isinstance(values, list):
        raise GrammarError(f"{where[:200]}, enum: expected a list, got {type(values).__name__}.")
    if multiple is not None and (
        isinstance(multiple, bool) or not isinstance(multiple, int | float) or not 0 < multiple < math.inf
    ):
        raise GrammarError(f"{where[:200]}, multipleOf: expected a number above 0, got {multiple!r:.80}.")


def _common(multiples: list[int | float]) -> int:
    """Return the least common multiple of decimal numbers, in units of their last digit."""
    exact = [Fraction(repr(value)) for value in multiples]
    unit = 1
    while any((value * unit).denominator > 1 for value in exact):
        unit *= 10
        if unit > MAX_MULTIPLE:
            return unit
    common = 1
    for value in exact:
        common = math.lcm(common, int(value * unit))
        if common > MAX_MULTIPLE:
            break
    return common


def check_regex(pattern: Any) -> None:
    """Raise unless a regular expression is short, also with its bounded repetitions written out.

    Args:
        pattern: of any dialect with groups, classes and {m,n}; whether it is right is not checked.

    Raises:
        GrammarError: it is none, or too long.
    """
    if not isinstance(pattern, str):
        raise GrammarError(f"a regular expression: expected text, got {type(pattern).__name__}.")
    if not pattern or len(pattern) > MAX_REGEX:
        raise GrammarError(
            f"a regular expression: expected 1 to {MAX_REGEX:,} characters, got {len(pattern):,}."
        )
    if re.search(r"\(\?[a-zA-Z]*x", pattern):
        raise GrammarError("a regular expression: the flag x is not supported. Write it without blanks.")
    if _expanded(pattern) > MAX_EXPANDED:
        raise GrammarError(
            f"a regular expression: its repetitions written out have more than {MAX_EXPANDED:,} characters."
        )


TOKENS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]|\{(?P<least>\d*)(?:,(?P<most>\d*))?\}|.", re.DOTALL
)


def _expanded(pattern: str) -> int:
    """Return about how long a regular expression is without bounded repetitions."""
    totals, last = [0], 0  # of the open groups; of the last atom
    for token in TOKENS.finditer(pattern):
        text = token[0]
        if text == "(":
            totals.append(0)
            last = 0
        elif text == ")" and len(totals) > 1:
            last = totals.pop() + 1
            totals[-1] += last
        elif token["least"] is not None and text != "{":
            times = max([int(number[:9]) for number in (token["least"], token["most"]) if number] or [1])
            totals[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
        else:
            last = last if text in "*+?" else 1
            totals[-1] += 1
        if totals[-1] > MAX_EXPANDED:
            break
    return max(totals)
