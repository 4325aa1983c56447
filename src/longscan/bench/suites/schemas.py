"""Random JSON schemas: what people ask for, in every combination, so that none of them is chosen by hand."""

from __future__ import annotations

from random import Random
from typing import Any

__all__ = ["random_schema"]

NAMES = (
    *("id", "name", "age", "city", "tags", "score", "is_open", "created-at", "first name", "naïve"),
    *("名", "price", "$key", "a/b", "x", "children", "address", "notes", "émoji ☃", "type"),
)
PATTERNS = ("^[A-Z]{3}-[0-9]{2,4}$", "^(yes|no|maybe)$", "^[a-z]+(_[a-z]+)*$", "^#[0-9a-f]{6}$")
FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4")
VALUES = ("red", "dark green", "", 'a "quote"', "back\\slash", "línea\nnueva", 0, -7, 2.5, True, None)
LEAVES = ("string", "text", "pattern", "format", "integer", "number", "boolean", "null", "enum", "const")


def random_schema(draw: Random, depth: int = 3) -> dict[str, Any]:
    """Return a random schema of JSON Schema 2020-12, an object at the top.

    Each level is an object (1 to 5 of NAMES, any of them required), an array (up to 4 items, or a tuple), a
    choice (`anyOf`), a reference into `$defs`, or a leaf: strings with bounds, patterns or formats, bounded
    integers or multiples, numbers, booleans, null, `enum` and `const`. Lengths are bounded; a text without
    a bound, such as the digits of 1/3 or an address, would go on for as long as a random model likes.

    Args:
        draw: randomness; one generator in one state gives one schema.
        depth: levels below the top, at most.
    """
    shared = {f"shared{i}": _any(draw, 1, ()) for i in range(draw.randrange(3))}
    schema = _object(draw, depth, tuple(shared))
    return {**schema, "$defs": shared} if shared else schema


def _any(draw: Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    """Return a schema with so many levels below it, at most."""
    kinds = ["leaf"] * 3 + (["object", "object", "array", "array", "choice"] if depth else [])
    kind = draw.choice(kinds + ["reference"] * bool(shared))
    if kind == "object":
        return _object(draw, depth - 1, shared)
    if kind == "array":
        return _array(draw, depth - 1, shared)
    if kind == "choice":
        return {"anyOf": [_any(draw, depth - 1, shared) for _ in range(draw.randint(2, 3))]}
    if kind == "reference":
        return {"$ref": f"#/$defs/{draw.choice(shared)}"}
    return _leaf(draw)


def _object(draw: Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    """Return the schema of an object."""
    names = draw.sample(NAMES, draw.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(draw, depth, shared) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }


def _array(draw: Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    """Return the schema of an array, all items of which are alike, or of a tuple."""
    if draw.random() < 0.3:
        items = [_any(draw, depth, shared) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    least = draw.randrange(3)
    bounds = {"minItems": least, "maxItems": least + draw.randint(1, 2)}
    return {"type": "array", "items": _any(draw, depth, shared), **bounds}


def _leaf(draw: Random) -> dict[str, Any]:
    """Return the schema of a value without parts."""
    kind = draw.choice(LEAVES)
    if kind == "string":
        least = draw.randrange(6)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(1, 20)}
    if kind == "text":
        return {"type": ["string", "null"], "maxLength": draw.randint(1, 60)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(PATTERNS), "maxLength": 30}
    if kind == "format":
        return {"type": "string", "format": draw.choice(FORMATS), "maxLength": 40}
    if kind == "integer":
        least = draw.randint(-500, 500)
        bounds = {"minimum": least, "maximum": least + draw.randint(20, 1000)}
        return {
            "type": "integer",
            **bounds,
            **({"multipleOf": draw.randint(2, 9)} if draw.random() < 0.3 else {}),
        }
    if kind == "number":
        least = draw.randint(-50, 50)
        bounds = {"minimum": least, "exclusiveMaximum": least + draw.randint(1, 100)}
        return {"type": "number", **bounds, "multipleOf": 0.25}
    if kind == "enum":
        return {"enum": draw.sample(VALUES, draw.randint(1, 5))}
    if kind == "const":
        return {"const": draw.choice(VALUES)}
    return {"type": kind}
