"""Conversations as files: the messages, which are the truth, and a state, which only saves time.

The JSON names the state by its hash and is written last. So whatever is interrupted, a state is used only
with the messages it belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longscan.core.files import utf8, write_json
from longscan.errors import LongscanError, UsageError
from longscan.inference.turns import Known
from longscan.models import LanguageModel, State
from longscan.tokenizers.chat import check_messages

__all__ = ["load_chat", "save_chat"]

FORMAT = "longscan chat 1"


def save_chat(path: Path, messages: list[dict[str, Any]], known: Known | None, model: LanguageModel) -> None:
    """Write a conversation.

    Args:
        path: of the JSON file; the state is in PATH.state.
        messages: see `Conversation.messages`.
        known: its last state, if there is one.
        model: of the state.

    Raises:
        LongscanError: the path is a directory.
        OSError: a file cannot be written.
    """
    if path.is_dir() or not path.name:
        raise LongscanError(f"{path}: expected the name of a file, got a directory.")
    content: dict[str, Any] = {"format": FORMAT, "messages": messages}
    if known is not None:
        file, saved = _state_file(path), known.saved
        saved.state.save(file, position=saved.position, pending=saved.pending, model=model)
        content["state"] = {"sha256": _hash(file), "holds": known.pieces}
    write_json(path, content)
    if known is None:  # what was removed from a conversation must not stay in its old state
        _state_file(path).unlink(missing_ok=True)


def load_chat(path: Path, model: LanguageModel) -> tuple[list[dict[str, Any]], Known | None]:
    """Return the messages of a conversation, and its state, if it is there and this model's.

    Args:
        path: of the JSON file.
        model: of the state.

    Raises:
        LongscanError: the file holds no messages.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(utf8(path.read_bytes(), str(path)))
    except (ValueError, RecursionError) as error:
        raise LongscanError(f"{path}: expected a conversation as JSON: {error}.") from error
    messages, state = (
        (content.get("messages"), content.get("state")) if isinstance(content, dict) else (content, None)
    )
    if not isinstance(messages, list):
        raise LongscanError(f"{path}: expected a JSON object with a list of messages, or such a list.")
    try:
        if messages:
            check_messages(messages)
    except UsageError as error:
        raise LongscanError(f"{path}: {error}") from error
    return messages, _load_state(state, _state_file(path), model) if isinstance(state, dict) else None


def _load_state(stated: Mapping[str, Any], file: Path, model: LanguageModel) -> Known | None:
    """Return the state of a conversation, or None if it is missing, another one, or another model's."""
    pieces = stated.get("holds")
    if not isinstance(pieces, list) or not all(type(piece) in (str, int) for piece in pieces):
        return None
    try:
        if _hash(file) != stated.get("sha256"):
            return None
        saved = State.load(file, model)
    except (OSError, LongscanError):
        return None
    return Known(pieces, saved) if saved.state.batch_size == 1 else None


def _state_file(path: Path) -> Path:
    """Return where the state of a conversation is."""
    return path.with_name(path.name + ".state")


def _hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
