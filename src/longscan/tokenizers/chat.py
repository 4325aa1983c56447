"""From messages to a prompt: chat templates, and special tokens that only a template can write.

`render` keeps the text of a prompt and its special tokens apart: it returns pieces, of which a string is text
and a number a special token. What a user spells out, `<|im_end|>` say, stays text.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from longscan.core.files import utf8
from longscan.errors import LongscanError, UsageError
from longscan.tokenizers import template_worker
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat_templates import DEFAULT

__all__ = ["BUILT_IN", "ROLES", "ChatTemplate", "Pieces", "check_messages", "find_template", "join"]

Pieces: TypeAlias = list[str | int]  # text, and ids of special tokens

ROLES = ("system", "user", "assistant", "tool")
MAX_SOURCE = 64 << 10  # characters of a template
SECONDS = 5.0  # that a template may take
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
        marker = f"{secrets.randbelow(10**20):020}"  # digits, which no filter changes
        broken = functools.partial(_break, names=tuple(tokenizer.special_tokens), marker=marker)
        given = {**tokenizer.roles, **variables, "messages": messages, "add_generation_prompt": prompt}
        request = {
            "source": self.source,
            "variables": {name: _map(broken, value) for name, value in given.items()} | tokenizer.roles,
            "time": self.time,
            "limit": LIMIT,
        }
        got = _worker().ask(request)
        if "text" in got:
            prefix = [] if self.own else list(tokenizer.prefix)
            return [*prefix, *_split(got["text"], tokenizer.special_tokens, marker)]
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
        after = [piece for piece in pieces[last + 1 :] if isinstance(piece, int)][:1]
        behind = str(pieces[last]).rpartition(PROBE)[2].strip() if last >= 0 else ""
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


def _map(change: Any, value: Any) -> Any:
    """Return a JSON value with all its texts changed, those of keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map(change, one) for key, one in value.items()}
    return [_map(change, one) for one in value] if isinstance(value, list | tuple) else value


def _break(text: str, names: tuple[str, ...], marker: str) -> str:
    """Return a text that spells out no special token: a marker follows the first character of each."""
    if not any(name in text for name in names):
        return text
    spelled = re.compile("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names))
    return spelled.sub(lambda found: found[0] + marker, text)


def _split(text: str, special: Mapping[str, int], marker: str) -> Pieces:
    """Return what a template wrote, cut at the special tokens."""
    names = sorted(special, key=len, reverse=True)
    cut = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return join([special[part] if i % 2 else part.replace(marker, "") for i, part in enumerate(cut)])


class _Worker:
    """The process that runs templates; it starts when it is needed, and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the worker's answer, see `template_worker.answer`."""
        line = json.dumps(request) + "\n"
        with self._lock:
            process = self._started()
            assert process.stdin
            assert process.stdout
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            except BaseException:  # Ctrl-C: the next request must not get this answer
                self.stop()
                raise
            finally:
                timer.cancel()
            if not answer:
                self.stop()
                return {"kind": "template", "error": f"it takes more than {SECONDS:g} s, or too much memory"}
        found: dict[str, str] = json.loads(answer)
        return found

    def _started(self) -> subprocess.Popen[str]:
        """Return the running process."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", template_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is not for it
            )
        return self._process

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream
                with contextlib.suppress(OSError):
                    stream.close()
        self._process = None


@functools.cache
def _worker() -> _Worker:
    """Return the only worker."""
    return _Worker()
