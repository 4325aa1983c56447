"""What a model is fine-tuned on: conversations, prompts with completions, texts; a row of JSON each.

    {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}     as OpenAI, TRL and mlx-lm have them
    {"conversations": [{"from": "human" or "gpt", "value": ...}, ...]}     ShareGPT
    {"instruction": ..., "input": ..., "output": ...}                      Alpaca
    {"prompt": ..., "completion": ...}                                     texts, or lists of messages
    {"text": ...}

Plain text files are texts too, one each. What a row is, its own keys say.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longscan.core.random import RandomStream
from longscan.data.documents import JSONL, Paths, find_files
from longscan.data.text_files import iter_lines, read_text, text_kind
from longscan.errors import LongscanError

__all__ = ["Found", "Row", "Rows", "divide", "read_directory", "read_rows"]

MAX_DEPTH = 64  # of a row's JSON
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# what else of a message the chat template may read, or says how it is learnt
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")
# of the files in a directory: what they are for
TRAIN, VALID = "train", ("valid", "validation", "test")


class Row(NamedTuple):
    """One example.

    Attributes:
        messages: a conversation; None if it is none.
        prompt: what is not learnt, and
        completion: what is learnt, of all other rows.
        tools: of a conversation; None if there are none.
        where: file and line.
    """

    messages: list[dict[str, Any]] | None
    prompt: str
    completion: str
    tools: list[Any] | None
    where: str


class Rows(NamedTuple):
    """Examples, and the rows that are none.

    Attributes:
        rows: in order.
        faults: what is wrong with each of the others, with file and line.
    """

    rows: list[Row]
    faults: list[str]


class Found(NamedTuple):
    """The files of paths: those to train on, those that validate, and those that are left out."""

    train: list[Path]
    valid: list[Path]
    others: list[Path]


def read_directory(paths: Paths) -> Found:
    """Return what the files of paths are for.

    A directory with a `train.jsonl` may hold a `valid.jsonl`, `validation.jsonl` or `test.jsonl`: the first
    of these validates, and all else there is left out. Otherwise everything is for training.

    Args:
        paths: files and directories, see `find_files`.

    Raises:
        LongscanError: a path does not exist, or a directory holds no text.
    """
    found = Found([], [], [])
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        files = find_files([path])
        named: dict[str, list[Path]] = {}
        for file in files:
            if text_kind(file) in JSONL and file.parent == path:
                named.setdefault(file.name.partition(".")[0], []).append(file)
        if not path.is_dir() or TRAIN not in named:
            found.train.extend(files)
            continue
        valid = next((named[name] for name in VALID if name in named), [])
        found.train.extend(named[TRAIN])
        found.valid.extend(valid)
        found.others.extend(file for file in files if file not in (*named[TRAIN], *valid))
    return found


def read_rows(files: Sequence[Path]) -> Rows:
    """Return the examples of files.

    Args:
        files: .jsonl with a row per line, or text; UTF-8, also .gz or .xz.

    Raises:
        LongscanError: a file is not UTF-8, is damaged, or a line has no end.
        OSError: a file can't be read.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for file in files:
        if text_kind(file) not in JSONL:
            text = "".join(read_text(file))
            if text.strip():
                rows.append(Row(None, "", text, None, str(file)))
            continue
        for number, line in enumerate(iter_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                rows.append(_row(_parse(line), where))
            except LongscanError as error:
                faults.append(f"{where}: {error}")
    return Rows(rows, faults)


def divide(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Return training rows and validation rows; the split is always the same.

    Args:
        rows: all of them.
        fraction: to hold out; one row at least if there are ten, but never all.
    """
    n = round(fraction * len(rows))
    n = max(n, 1) if fraction > 0 and len(rows) >= 10 else n
    n = min(n, len(rows) - 1)
    held = set(RandomStream(0, 0).permutation(len(rows))[:n].tolist())
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )


def _parse(line: str) -> Mapping[str, Any]:
    """Return the object on a line."""
    try:
        value = json.loads(line, parse_constant=_no_number)
        _check_depth(value)
        line.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise LongscanError("half of a surrogate pair.") from error
    except (ValueError, RecursionError) as error:
        what = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise LongscanError(f"not JSON ({what}).") from error
    if not isinstance(value, dict):
        raise LongscanError(f"expected an object, got {type(value).__name__}.")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any, depth: int = 0) -> None:
    """Raise ValueError if a JSON value is nested too deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_depth(one, depth + 1)


def _row(value: Mapping[str, Any], where: str) -> Row:
    """Return what an object says."""
    if "chosen" in value or "rejected" in value:
        raise LongscanError("preferences (chosen, rejected) are not trained on. Give prompt and completion.")
    if "messages" in value:
        return Row(_messages(value["messages"], "messages"), "", "", _tools(value.get("tools")), where)
    if "conversations" in value:
        messages = [*_system(value), *_messages(value["conversations"], "conversations")]
        return Row(messages, "", "", _tools(value.get("tools")), where)
    if "instruction" in value and "output" in value:
        return Row(_instruction(value), "", "", None, where)
    if "prompt" in value and "completion" in value:
        if isinstance(value["prompt"], list) and isinstance(value["completion"], list):
            both = [*value["prompt"], *value["completion"]]
            return Row(_messages(both, "prompt and completion"), "", "", _tools(value.get("tools")), where)
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            raise LongscanError(f"prompt: expected text, got {type(prompt).__name__}.")
        return Row(None, prompt, _text(value, "completion"), None, where)
    if "text" in value:
        return Row(None, "", _text(value, "text"), None, where)
    keys = ", ".join(map(str, value))[:120] or "no keys"
    raise LongscanError(f"expected messages, prompt and completion, or text; got {keys}.")


def _system(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the system message that stands beside a conversation."""
    return [{"role": "system", "content": _text(value, "system")}] if value.get("system") else []


def _instruction(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of an instruction: system, history, what is asked, and the answer."""
    history = value.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise LongscanError("history: expected pairs of a question and its answer.")
    asked = _text(value, "instruction")
    if isinstance(value.get("input"), str) and value["input"].strip():
        asked += "\n\n" + value["input"]
    turns = [*history, [asked, _text(value, "output")]]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*_system(value), *_messages(messages, "history")]


def _text(value: Mapping[str, Any], key: str) -> str:
    """Return a text that is not empty."""
    text = value[key]
    if not isinstance(text, str):
        raise LongscanError(f"{key}: expected text, got {type(text).__name__}.")
    if not text.strip():
        raise LongscanError(f"{key}: expected text, got none.")
    return text


def _tools(value: Any) -> list[Any] | None:
    """Return the tools of a conversation, which may be JSON as text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is not None and not isinstance(value, list):
        raise LongscanError(f"tools: expected a list, got {type(value).__name__}.")
    return value or None


def _messages(value: Any, key: str) -> list[dict[str, Any]]:
    """Return messages with the usual names."""
    if not isinstance(value, list) or not value:
        raise LongscanError(f"{key}: expected a list of messages, got {_kind(value)}.")
    messages = []
    for index, given in enumerate(value):
        where = f"{key}[{index}]"
        if not isinstance(given, dict):
            raise LongscanError(f"{where}: expected an object, got {_kind(given)}.")
        role = given.get("role", given.get("from"))
        role = role.lower() if isinstance(role, str) else role
        if not isinstance(role, str) or role not in ROLES:
            raise LongscanError(
                f"{where}: expected a role such as user or assistant, got {str(role)[:40]!r}."
            )
        content = given.get("content", given.get("value"))
        if isinstance(content, list):  # OpenAI's parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise LongscanError(f"{where}.content: expected parts of text only.")
            content = "".join(map(str, parts))
        if not isinstance(content, str) and not (content is None and given.get("tool_calls")):
            raise LongscanError(f"{where}.content: expected text, got {_kind(content)}.")
        if (weight := given.get("weight", 1)) not in (0, 1):
            raise LongscanError(f"{where}.weight: expected 0 or 1, got {str(weight)[:40]}.")
        others = {name: given[name] for name in MESSAGE_FIELDS if given.get(name) is not None}
        if "tool_calls" in others:
            others["tool_calls"] = [
                _call(call, f"{where}.tool_calls") for call in _list(others["tool_calls"])
            ]
        messages.append({"role": ROLES[role], "content": content, **others})
    return messages


def _list(value: Any) -> list[Any]:
    """Return a list as it is, and anything else as one element, which is then found to be none."""
    return value if isinstance(value, list) else [value]


def _call(value: Any, where: str) -> dict[str, Any]:
    """Return a call of a tool, its arguments as an object: templates write them as JSON."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise LongscanError(f"{where}: expected calls with a function and its name, got {str(value)[:60]}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {**value, "function": {**function, "arguments": arguments}}


def _kind(value: Any) -> str:
    """Return the type of a JSON value in a word."""
    return "nothing" if value in (None, [], "") else type(value).__name__
