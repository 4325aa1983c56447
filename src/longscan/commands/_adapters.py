"""The adapters of a command line: names and directories, beside the weights of one base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from longscan.checkpoints.adapter import beside
from longscan.core.printable import printable
from longscan.errors import UsageError
from longscan.models import LanguageModel
from longscan.models.common.lora import adapted
from longscan.models.common.quantization import kind_of
from longscan.models.common.summary import scaled
from longscan.tokenizers.base import Tokenizer

__all__ = ["NONE", "Adapted", "Adapters", "load_adapters", "only", "size_of"]

Adapters: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]DIR",
        help="A LoRA adapter: PEFT's directory, or a run of `longscan finetune`; repeatable.",
    ),
]
Adapted: TypeAlias = dict[str, tuple[LanguageModel, Tokenizer]]
NONE = "none"  # what a base without adapters is called
NAME = r"[A-Za-z0-9][\w.:-]{0,63}"


def load_adapters(
    model: LanguageModel, tokenizer: Tokenizer, given: Sequence[str] | None, taken: str
) -> Adapted:
    """Return name -> model and tokenizer, in the given order; all share the weights of the base.

    Args:
        model: the base.
        tokenizer: the base's.
        given: of `--adapter`.
        taken: the name of the base.

    Raises:
        UsageError: a name is no name, or that of two models.
        LongscanError: an adapter is damaged, or not of this model.
        OSError: one can't be read.
    """
    directories: dict[str, str] = {}
    for one in given or ():
        name, directory = _split(one)
        if not re.fullmatch(NAME, name, re.ASCII) or name == NONE:
            raise UsageError(
                f"--adapter {printable(one)}: expected a name of letters, digits and . _ : -, which is not "
                f"{NONE!r}, got {name!r}. Use NAME=DIR."
            )
        if name in directories or name == taken:
            other = "the base" if name == taken else directories[name]
            raise UsageError(
                f"--adapter {printable(one)}: {name!r} is also the name of {other}. Use NAME=DIR."
            )
        directories[name] = directory
    if not directories:
        return {}
    fingerprint = None if kind_of(model) else model.fingerprint()
    found: Adapted = {}
    for name, directory in directories.items():
        network, own = beside(model, tokenizer, directory, fingerprint)
        assert own is not None
        found[name] = network, own
    return found


def only(given: Sequence[str] | None) -> str | None:
    """Return the directory of the only adapter; None if there is none, or there are several.

    Args:
        given: of `--adapter`.
    """
    return _split(given[0])[1] if given and len(given) == 1 else None


def size_of(found: Adapted) -> str:
    """Return the names of adapters and the memory they take.

    Args:
        found: see `load_adapters`.
    """
    matrices = [
        tensor
        for model, _ in found.values()
        for _, one in adapted(model)
        for tensor in (one.lora_A, one.lora_B)
    ]
    return f"{', '.join(found)} · {scaled(sum(matrix.nbytes for matrix in matrices), 'kMG')}B beside the base"


def _split(given: str) -> tuple[str, str]:
    """Return the name and the directory of [NAME=]DIR; what has a slash before the = is a directory."""
    name, equals, directory = given.partition("=")
    if equals and "/" not in name:
        return name, directory
    return Path(given).resolve().name, given
