"""From messages to a prompt: chat templates, and special tokens that only a template can write.

`render` keeps the text of a prompt and its special tokens apart: it returns pieces, of which a string is text
and a number a special token. What a user spells out, `<|im_end|>` say, stays text.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from longscan.core.files import utf8
from longscan.core.worker_process import WorkerProcess
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers import template_worker
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat_templates import DEFAULT

__all__ = [
    "BUILT_IN",
    "ROLES",
    "ChatTemplate",
    "Pieces",
    "_check_depth",
    "check_messages",
    "find_template",
    "join",
]

Pieces: TypeAlias = list[str | int]  # text, and ids of special tokens

ROLES = ("system", "user", "assistant", "tool")
MAX_SOURCE = 64 << 10  # characters of a template
SECONDS = 5.0  # that a template may take
MAX_DEPTH = 100  # of messages and variables
LIMIT = 16 << 20  # characters that it may write
PROBE = "an answer"  # of the assistant, to see what ends it

# an answer usually begins with the space behind "Assistant:"
PLAIN = """{% for message in messages %}
{{ message.role | capitalize }}:{{ ' ' if message.content[:1] | trim }}{{ message.content }}

{% endfor %}
{% if add_generation_prompt %}
Assistant:{% endif %}"""
CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
#: name -> template, for models that come without one
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}
STOPS = {"plain": ("\nUser:", "\nSystem:", "\nAssistant:")}


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants to be talked to.

    Attributes:
        source: Jinja.
        name: "default" or another name of the tokenizer's, a built-in one, or a file.
        own: whether it came with the tokenizer.
        time: what `strftime_now` says, in seconds since 1970: the same for a whole conversation.
    """

    source: str
    name: str
    own: bool
    time: float = field(default_factory=time.time)

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = True,
        **variables: Any,
    ) -> Pieces:
        """Return the pieces of a conversation.

        Args:
            tokenizer: of the model.
            messages: each with a `role` and its `content`.
            prompt: whether the beginning of an answer follows (`add_generation_prompt`).
            variables: others that the template reads, such as `tools`.

        Raises:
            UsageError: a message is none, or the template rejects them.
            LongscanError: the template is at fault: its syntax, its time, its memory.
        """
        check_messages(messages)
        special = tokenizer.special_tokens
        given = {**variables, "messages": messages}
        _check_depth(given)
        text = _as_json(given)
        aliases = _aliases(special, text + self.source)
        fixed = {**tokenizer.roles, "add_generation_prompt": prompt}
        pieces = self._run(
            _map(functools.partial(_hide_names, special, aliases), given) | fixed, special, aliases
        )
        if any(char in text for char in aliases):
            # joined, cut or changed by the template, texts might still spell a special token: without the
            # characters for it there would be none
            strict = self._run(_map(functools.partial(_hide_all, aliases), given) | fixed, special, aliases)
            if [p for p in strict if isinstance(p, int)] != [p for p in pieces if isinstance(p, int)]:
                raise UsageError(
                    f"with the chat template {self.name!r} these messages would spell special tokens: "
                    "expected text that does not."
                )
        return [*([] if self.own else tokenizer.prefix), *pieces]

    def _run(
        self, variables: dict[str, Any], special: Mapping[str, int], aliases: Mapping[str, str]
    ) -> Pieces:
        """Return what the template makes of variables, with the characters behind their aliases."""
        request = {"source": self.source, "variables": variables, "time": self.time, "limit": LIMIT}
        late = f"it takes more than {SECONDS:g} s, or too much memory"
        got: dict[str, str] = _worker().ask(request) or {"kind": "template", "error": late}
        if "text" in got:
            utf8(got["text"].encode(errors="surrogatepass"), f"what the chat template {self.name!r} writes")
            return _split(got["text"], special, aliases)
        what = f"the chat template {self.name!r}"
        if got["kind"] == "rejected":
            raise UsageError(f"{what} rejects these messages: {got['error']}")
        raise LongscanError(f"{what} failed: {got['error'].rstrip('.')}. Use another one, with --template.")

    def ends(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return what ends an answer.

        Args:
            tokenizer: of the model.

        Returns:
            The tokens: the one that the template writes after an answer, and the tokenizer's own; and
            strings, if the template writes text there.

        Raises:
            LongscanError: see `render`.
        """
        stops = () if self.own else STOPS.get(self.name, ())
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        try:
            pieces = self.render(tokenizer, messages, prompt=False)
        except UsageError:  # it has demands on messages
            return tokenizer.eos_ids, stops
        last = max(
            (i for i, piece in enumerate(pieces) if isinstance(piece, str) and PROBE in piece), default=-1
        )
        if last < 0:
            return tokenizer.eos_ids, stops
        after = [piece for piece in pieces[last + 1 :] if isinstance(piece, int)][:1]
        behind = str(pieces[last]).rpartition(PROBE)[2].strip()
        return tuple(dict.fromkeys([*after, *tokenizer.eos_ids])), (*stops, *([behind] if behind else []))


def find_template(tokenizer: Tokenizer, name: str | None = None) -> ChatTemplate:
    """Return a chat template.

    Args:
        tokenizer: of the model.
        name: of one of the tokenizer's or a built-in one, or a file; None for the tokenizer's default, or
            "plain" if it has none.

    Raises:
        UsageError: there is no such template.
        LongscanError: it is longer than 64 KiB.
        OSError: the file cannot be read.
    """
    own = tokenizer.chat_templates
    if name is None:
        name = DEFAULT if DEFAULT in own else "plain"
    if name in own:
        found = ChatTemplate(own[name], name, own=True)
    elif name in BUILT_IN:
        found = ChatTemplate(BUILT_IN[name], name, own=False)
    elif (path := Path(name)).is_file():
        found = ChatTemplate(utf8(path.read_bytes(), name), name, own=True)
    else:
        known = ", ".join(sorted({*own, *BUILT_IN}))
        raise UsageError(f"no chat template {name!r}: expected one of {known}, or a file.")
    if len(found.source) > MAX_SOURCE:
        raise LongscanError(
            f"the chat template {name!r}: expected at most {MAX_SOURCE:,} characters, "
            f"got {len(found.source):,}."
        )
    return found


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless messages are messages.

    Args:
        messages: see `ChatTemplate.render`.

    Raises:
        UsageError: a role or a content is none.
    """
    if not messages:
        raise UsageError("messages: expected at least one.")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where}: expected an object, got {type(message).__name__}.")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UsageError(f"{where}.role: expected {', '.join(ROLES)}, got {str(role)[:40]!r}.")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise UsageError(f"{where}.content: expected text, got {type(content).__name__}.")
        utf8((content or "").encode(errors="surrogatepass"), f"{where}.content")


def join(pieces: Sequence[str | int]) -> Pieces:
    """Return pieces without empty ones, neighbouring texts as one.

    Args:
        pieces: any.
    """
    joined: Pieces = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def _check_depth(value: Any, depth: int = 0) -> None:
    """Raise unless a JSON value is of a depth that can be worked on.

    Args:
        value: of messages and variables.
        depth: of what it is inside.

    Raises:
        UsageError: it is nested more deeply.
    """
    if depth > MAX_DEPTH:
        raise UsageError(f"messages: expected values nested at most {MAX_DEPTH} deep.")
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            _check_depth(one, depth + 1)


def _as_json(variables: Mapping[str, Any]) -> str:
    """Return variables as JSON, after a check."""
    try:
        return json.dumps(variables, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"messages and variables of a chat template: expected JSON values ({error})."
        ) from error


def _map(change: Callable[[str], str], value: Any) -> Any:
    """Return a JSON value with all its texts changed, those of keys too, but not the roles of messages."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: one
            if key == "role" and one in ROLES
            else _map(change, one)
            for key, one in value.items()
        }
    return [_map(change, one) for one in value] if isinstance(value, list | tuple) else value


def _aliases(special: Mapping[str, int], text: str) -> dict[str, str]:
    """Return characters that no text has, for those without which no special token can be spelled.

    These are the first one of each token and all that are neither letters nor digits; "_" is in many keys.
    """
    chars = {name[0] for name in special if name}
    chars |= {char for name in special for char in name if not char.isalnum() and char != "_"}
    free = (char for char in map(chr, range(0xE000, 0xF900)) if char not in text)
    return dict(zip(sorted(chars), free, strict=False))


def _hide_names(special: Mapping[str, int], aliases: Mapping[str, str], text: str) -> str:
    """Return a text whose special tokens begin with an alias."""
    for name in special:
        if name in text:
            text = text.replace(name, aliases[name[0]] + name[1:])
    return text


def _hide_all(aliases: Mapping[str, str], text: str) -> str:
    """Return a text with an alias for each character that has one."""
    return text.translate({ord(char): alias for char, alias in aliases.items()})


def _split(text: str, special: Mapping[str, int], aliases: Mapping[str, str]) -> Pieces:
    """Return what a template wrote, cut at the special tokens."""
    names = sorted(filter(None, special), key=len, reverse=True)
    cut = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    back = {ord(alias): char for char, alias in aliases.items()}
    return join([special[part] if i % 2 else part.translate(back) for i, part in enumerate(cut)])


@functools.cache
def _worker() -> WorkerProcess:
    """Return the only worker."""
    return WorkerProcess(template_worker.__file__, SECONDS)
