"""Which tokens are special: what begins a text and what ends it, out of the files beside a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from longscan.errors import LongscanError
from longscan.tokenizers.rules import template_prefix

__all__ = [
    "END_NAMES",
    "END_OF_TEXT",
    "IDS",
    "check_ids",
    "find_eos",
    "find_others",
    "find_roles",
    "id_of",
    "name_of",
    "template",
]

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")  # in order of preference
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")  # in tokenizer_config.json
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in config.json and generation_config.json


def check_ids(directory: Path, configs: Mapping[str, dict[str, Any]]) -> None:
    """Raise unless the ids of special tokens are ids.

    Args:
        directory: where the configurations are, for the message.
        configs: see `find_eos`.

    Raises:
        LongscanError: one is a name, a fraction or a truth value.
    """
    for file in ("generation_config.json", "config.json"):
        for name in IDS:
            value = configs.get(file, {}).get(name)
            ids = value if isinstance(value, list) else [0 if value is None else value]
            if any(type(index) is not int for index in ids):
                raise LongscanError(
                    f"{directory / file}: {name}: expected an id, a list of ids or null, got "
                    f"{str(value)[:40]!r} ({type(value).__name__})."
                )


def find_eos(tokenizer: tokenizers.Tokenizer, configs: Mapping[str, dict[str, Any]]) -> int | None:
    """Find the id that ends a document.

    Args:
        tokenizer: the vocabulary.
        configs: what stands in tokenizer_config.json, generation_config.json and config.json, by their names.

    Returns:
        The first id that the configurations or the usual names give; see `load_tokenizer`. None if none does.
    """
    for name in (_name_in(configs, "eos_token"), *END_NAMES):
        if name is not None and (index := _index_of(tokenizer, name)) is not None:
            return index
    ids = [*_ids_in(configs, "generation_config.json"), *_ids_in(configs, "config.json")]
    return next((index for index in ids if name_of(tokenizer, index) is not None), None)


def find_others(tokenizer: tokenizers.Tokenizer, configs: Mapping[str, dict[str, Any]]) -> list[int]:
    """List the ids that the configurations say end a text; a single one in config.json is often a default.

    Args:
        tokenizer: the vocabulary; what it does not have is left out.
        configs: see `find_eos`.
    """
    ids = _ids_in(configs, "generation_config.json")
    if not ids and len(listed := _ids_in(configs, "config.json")) > 1:
        ids = listed
    return [index for index in ids if name_of(tokenizer, index) is not None]


def find_roles(tokenizer: tokenizers.Tokenizer, configs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Find the names of the special tokens: stated, or by their ids in the model's configurations.

    Args:
        tokenizer: the vocabulary.
        configs: see `find_eos`.

    Returns:
        role -> name, of the roles that some token has.
    """
    roles: dict[str, str] = {}
    for role in ROLES:
        name = _name_in(configs, role)
        if role == "bos_token" and name is None and (names := template(tokenizer)):
            name = names[0]
        if name is None or _index_of(tokenizer, name) is None:
            files = ("generation_config.json", "config.json") if f"{role}_id" in IDS else ()
            ids = [index for file in files for index in _ids_in(configs, file, f"{role}_id")]
            name = next((token for index in ids if (token := name_of(tokenizer, index)) is not None), None)
        if name is not None:
            roles[role] = name
    return roles


def _name_in(configs: Mapping[str, dict[str, Any]], role: str) -> str | None:
    """Return the name that tokenizer_config.json gives a special token."""
    stated = configs.get("tokenizer_config.json", {}).get(role)
    name = stated.get("content") if isinstance(stated, dict) else stated
    return name if isinstance(name, str) else None


def _ids_in(configs: Mapping[str, dict[str, Any]], file: str, name: str = "eos_token_id") -> list[int]:
    """Return the id or the ids that a configuration of a model states."""
    value = configs.get(file, {}).get(name)
    return [index for index in (value if isinstance(value, list) else [value]) if type(index) is int]


def _index_of(tokenizer: tokenizers.Tokenizer, name: str) -> int | None:
    """Return the id of a name, if there is one: a lone surrogate, which JSON can spell, names nothing."""
    try:
        return tokenizer.token_to_id(name)
    except UnicodeError:
        return None


def id_of(tokenizer: tokenizers.Tokenizer, name: str) -> int:
    """Return the id of a token of the vocabulary.

    Args:
        tokenizer: the vocabulary.
        name: of the token.

    Raises:
        LongscanError: there is no such token.
    """
    index = tokenizer.token_to_id(name)
    if index is None:
        raise LongscanError(f"expected {name!r} in the vocabulary: the post-processor puts it before a text.")
    return index


def name_of(tokenizer: tokenizers.Tokenizer, index: int) -> str | None:
    """Return the name of an id, if there is one; the library takes no others than those of 32 bits.

    Args:
        tokenizer: the vocabulary.
        index: any number.
    """
    return tokenizer.id_to_token(index) if 0 <= index < 2**32 else None


def template(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """Name the special tokens that the post-processor puts before a text.

    Args:
        tokenizer: any.
    """
    processor = tokenizer.post_processor
    return template_prefix(json.loads(processor.__getstate__())) if processor is not None else ()
