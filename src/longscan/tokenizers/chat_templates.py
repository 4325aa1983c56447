"""The chat templates of a tokenizer, as files: Jinja that turns messages into a prompt. Nothing runs it here.

transformers writes the default one to chat_template.jinja, others to additional_chat_templates/NAME.jinja;
older directories have them in tokenizer_config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longscan.core.files import atomic_write
from longscan.errors import LongscanError

__all__ = ["DEFAULT", "FILES", "check_templates", "read_templates", "write_templates"]

DEFAULT = "default"  # the name of the template that is used unless another one is named
MAIN, OTHERS = "chat_template.jinja", "additional_chat_templates"
FILES = [MAIN, f"{OTHERS}/*.jinja"]
KEY = "chat_template"  # in tokenizer_config.json: text, or a list of names with texts
MAX_SIZE = 1 << 20  # bytes of a template
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # they become file names


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a model directory, name -> Jinja; files go before tokenizer_config.json.

    Args:
        directory: of the model; nothing is read from one that does not exist.
        config: the content of tokenizer_config.json.

    Raises:
        LongscanError: a template is no text, larger than 1 MiB, or its name is none for a file.
        OSError: a file cannot be read.
    """
    stated, where = config.get(KEY), f"{directory / 'tokenizer_config.json'}: {KEY}"
    if stated is None:
        templates: dict[str, str] = {}
    elif isinstance(stated, list) and all(isinstance(one, dict) for one in stated):
        pairs = [(one.get("name"), one.get("template")) for one in stated]
        templates = check_templates(pairs, where)
    else:
        templates = check_templates([(DEFAULT, stated)], where)
    files = [(file.stem, file) for file in sorted((directory / OTHERS).glob("*.jinja"))]
    for name, file in [*files, (DEFAULT, directory / MAIN)]:
        if not file.is_file():
            continue
        if file.stat().st_size > MAX_SIZE:
            raise LongscanError(f"{file}: expected a chat template of at most 1 MiB.")
        try:
            templates |= check_templates([(name, file.read_bytes().decode())], str(file))
        except UnicodeDecodeError as error:
            raise LongscanError(f"{file}: expected a chat template in UTF-8: {error}.") from error
    return templates


def check_templates(templates: Iterable[tuple[Any, Any]], where: str) -> dict[str, str]:
    """Return chat templates, name -> Jinja, after a check.

    Args:
        templates: names and Jinja.
        where: they come from, for the error.

    Raises:
        LongscanError: see `read_templates`.
    """
    checked = {}
    for name, text in templates:
        if not isinstance(name, str) or not NAMES.fullmatch(name):
            raise LongscanError(f"{where}: expected a name of letters, digits, _, . and -, got {name!r}.")
        if not isinstance(text, str) or len(text) > MAX_SIZE:
            got = "more" if isinstance(text, str) else type(text).__name__
            raise LongscanError(f"{where}: expected text of at most 1 MiB, got {got}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LongscanError(f"{where}: expected Unicode text, got a lone surrogate.") from error
        checked[name] = text
    return checked


def write_templates(directory: Path, templates: Mapping[str, str]) -> None:
    """Write chat templates as transformers reads them.

    Args:
        directory: of the tokenizer.
        templates: name -> Jinja.
    """
    for name, text in templates.items():
        if name == DEFAULT:
            atomic_write(directory / MAIN, text)
        else:
            (directory / OTHERS).mkdir(exist_ok=True)
            atomic_write(directory / OTHERS / f"{name}.jinja", text)
