"""The shapes of answers, as OpenAI's clients expect them."""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longscan.inference.sampling import Event, Finish
from longscan.tokenizers.base import Tokenizer

__all__ = [
    "DONE",
    "Head",
    "Listing",
    "Scored",
    "Settled",
    "chat_logprobs",
    "error",
    "finish_reason",
    "new_id",
    "sse",
    "token_text",
    "usage",
]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer begins with.

    Attributes:
        id: of the answer.
        object: its kind.
        model: its name.
        fingerprint: of weights, version and kernels.
        created: in seconds since 1970.
    """

    id: str
    object: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return an answer, or a chunk of it.

        Args:
            choices: of it.
            more: fields, such as `usage`.
        """
        head = {"id": self.id, "object": self.object, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint, "choices": choices, **more}


@dataclass(frozen=True)
class Scored:
    """A token and its log-probability.

    Attributes:
        token: its id.
        logprob: None if it has none, as the first one of a text.
        top: the most likely ones, the largest first.
    """

    token: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()

    @classmethod
    def of(cls, event: Event) -> Scored:
        """Return the token of an event.

        Args:
            event: with a log-probability.
        """
        return cls(event.token, event.logprob, event.top)


class Settled:
    """The log-probabilities of a continuation, listed when the text includes their tokens.

    A token is listed as soon as a character of it, or of a later one, is shown. So those that a stop string
    cuts off never are; one that reaches into a stop string is, as its beginning is shown.
    """

    def __init__(self) -> None:
        self._waiting: deque[Scored] = deque()
        self._listed = 0

    def add(self, event: Event) -> list[Scored]:
        """Take in a token, and return those to list now.

        Args:
            event: of the engine.
        """
        if event.logprob is None:
            return []
        self._waiting.append(Scored.of(event))
        n, self._listed = event.settled - self._listed, event.settled
        return [self._waiting.popleft() for _ in range(n)]


class Listing:
    """The log-probabilities of a completion: four parallel lists.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._offset, self._text = tokenizer, 0, tokenizer.stream()

    def of(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Return the next tokens.

        Args:
            scored: they and their log-probabilities.
        """
        tokens = [token_text(self._tokenizer, one.token) for one in scored]
        offsets = []
        for one in scored:
            offsets.append(self._offset)  # a character of several tokens counts once
            self._offset += len(self._text.push(one.token))
        tops: list[dict[str, float] | None] = []
        for one, token in zip(scored, tokens, strict=True):
            top: dict[str, float] = {}
            for other, logprob in one.top:  # different ids may have one text: the largest comes first
                top.setdefault(token_text(self._tokenizer, other), logprob)
            if one.logprob is not None:
                top.setdefault(token, one.logprob)
            tops.append(None if one.logprob is None else top)
        logprobs = [one.logprob for one in scored]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> dict[str, Any]:
    """Return the log-probabilities of a chat answer.

    Args:
        tokenizer: of the model.
        scored: the tokens.
    """

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if "\ufffd" in text else list(text.encode()),  # of a part of a character
        }

    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]}
        for one in scored
    ]
    return {"content": content, "refusal": None}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, or the name of a special one.

    Args:
        tokenizer: of the model.
        token: its id.
    """
    text = tokenizer.decode([token])
    if text:
        return text
    names = [name for name, special in tokenizer.special_tokens.items() if special == token]
    return names[0] if names else ""


def finish_reason(finish: Finish | None) -> str | None:
    """Return why an answer ended, in OpenAI's words.

    Args:
        finish: in ours.
    """
    return None if finish is None else "length" if finish == "length" else "stop"


def usage(prompt: int, written: int, cached: int = 0) -> dict[str, Any]:
    """Return the tokens that a request took.

    Args:
        prompt: tokens of the prompts.
        written: of the continuations.
        cached: of the prompts that a state held already.
    """
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error.

    Args:
        message: for people.
        kind: its type.
        code: for programs.
        param: the field at fault.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def new_id(prefix: str) -> str:
    """Return the id of an answer.

    Args:
        prefix: its kind: "cmpl" or "chatcmpl".
    """
    return f"{prefix}-{secrets.token_hex(12)}"


def sse(value: dict[str, Any]) -> bytes:
    """Return an event of a stream.

    Args:
        value: its data.
    """
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
