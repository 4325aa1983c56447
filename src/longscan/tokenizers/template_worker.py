"""The process that runs chat templates: Jinja out of foreign files, in a sandbox, with limits.

A sandbox keeps a template from Python's objects, but not from looping or filling the memory. So it runs in
this process, which imports nothing of longscan and may be killed at any time. Requests and answers are lines
of JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space


class RejectionError(TemplateError):
    """A template has called `raise_exception`."""


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` around what an assistant says: here only what is inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def serve() -> None:
    """Answer requests until stdin ends."""
    _limit_memory()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Run a template.

    Args:
        request: its `source`, `variables`, `time` in seconds since 1970, and the `limit` of characters.

    Returns:
        The `text`, or an `error`, with the `kind` "rejected" if the template itself refuses the messages.
    """
    try:
        return {"text": _run(**request)}
    except RejectionError as error:
        return {"kind": "rejected", "error": str(error)[:500]}
    except TemplateSyntaxError as error:
        return {"kind": "template", "error": f"line {error.lineno}: {error.message}"[:500]}
    except (SecurityError, UndefinedError) as error:
        return {"kind": "template", "error": str(error)[:500]}
    except RecursionError:
        return {"kind": "template", "error": "it is nested too deeply"}
    except MemoryError:
        return {"kind": "template", "error": "it needs more than 1 GiB of memory"}
    except Exception as error:  # whatever a foreign template makes of Python
        return {"kind": "template", "error": f"{type(error).__name__}: {error}"[:500]}


def _run(source: str, variables: dict[str, Any], time: float, limit: int) -> str:
    """Return what a template writes."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _reject
    now = datetime.datetime.fromtimestamp(time)
    environment.globals["strftime_now"] = now.strftime
    parts, size = [], 0
    for part in environment.from_string(source).generate(variables):
        parts.append(part)
        size += len(part)
        if size > limit:
            raise ValueError(f"it writes more than {limit:,} characters")
    return "".join(parts)


def _reject(message: str) -> None:
    """Raise the error that a template asks for."""
    raise RejectionError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without escapes for HTML, as templates expect it."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _limit_memory() -> None:
    """Limit this process's memory, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


if __name__ == "__main__":
    serve()
