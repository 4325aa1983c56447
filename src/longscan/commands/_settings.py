"""Flags from the fields of a settings class, so that flags, recipes and Python have the same names."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from longscan.training.config import RunConfig

__all__ = ["add_flags"]


def add_flags(command: Callable[..., None], kind: type[RunConfig]) -> None:
    """Replace the `**settings` of a command by a flag for each field of a settings class.

    Args:
        command: the function; Typer finds the flags in its new signature.
        kind: the settings class; its own fields come before inherited ones.
    """
    hints = typing.get_type_hints(kind)
    depth = {
        name: len(cls.__mro__)
        for cls in reversed(kind.__mro__)
        for name in vars(cls).get("__annotations__", ())
    }
    signature = inspect.signature(command, eval_str=True)
    parameters = list(signature.parameters.values())[:-1]
    for entry in sorted(fields(kind), key=lambda entry: -depth[entry.name]):
        if entry.metadata.get("argument"):
            continue
        shown = entry.default is not False and entry.default not in (None, (), "")
        default = f" [{entry.default}]" if shown else ""
        alias = entry.metadata["alias"]
        names = (alias, f"--{entry.name.replace('_', '-')}") if alias else ()
        option = typer.Option(*names, help=entry.metadata["help"] + default, show_default=False)
        several = typing.get_origin(hints[entry.name]) is tuple
        hint: Any = list[str] if several else hints[entry.name]
        annotation = Annotated[hint | None, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(entry.name, keyword, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
