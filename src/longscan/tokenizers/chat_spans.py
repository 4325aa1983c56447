"""Which tokens of a conversation its assistant writes: those that fine-tuning learns.

A template is a program, so an answer is found by rendering: what is added between the prompt before it and
the conversation up to it is the answer, and what ends it belongs to it, or the model would never stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longscan.errors import UsageError
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, Pieces, join

__all__ = ["Ends", "Span", "after", "spans"]


class Span(NamedTuple):
    """A part of a conversation.

    Attributes:
        pieces: text, and ids of special tokens.
        trained: whether the assistant writes it.
    """

    pieces: Pieces
    trained: bool


class Ends(NamedTuple):
    """What ends an answer, see `ChatTemplate.ends`."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def spans(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ends: Ends,
    **variables: Any,
) -> list[list[Span]]:
    """Return a conversation as spans; or, where a template rewrites what came before, one for each answer.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: each with a `role` and its `content`.
        ends: of the template.
        variables: others that the template reads, such as `tools`.

    Raises:
        UsageError: there is no answer among them, or the template rejects them.
        LongscanError: the template is at fault.
    """
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise UsageError("messages: expected one of the assistant at least, got none.")
    for i in answers:
        if not (messages[i].get("content") or "").strip() and not messages[i].get("tool_calls"):
            raise UsageError(f"messages[{i}].content: expected the assistant's answer, got an empty one.")

    def render(some: Sequence[Mapping[str, Any]], prompt: bool = True) -> Pieces:
        return template.render(tokenizer, some, prompt=prompt, **variables)

    begun = [
        (render(messages[:i]) if i else _start(template, tokenizer), render(messages[: i + 1], prompt=False))
        for i in answers
    ]
    whole: list[Span] = []
    done: Pieces = []
    for before, upto in begun:
        asked, answer = after(before, done), after(upto, before)
        if asked is None or answer is None:
            return [
                _single(before, upto, messages[i], ends)
                for i, (before, upto) in zip(answers, begun, strict=True)
            ]
        whole += [Span(asked, False), Span(answer, True)]
        done = upto
    return [_ended(whole, ends)]


def after(whole: Pieces, part: Pieces) -> Pieces | None:
    """Return what follows a part of a conversation, or None if it does not begin with it.

    Args:
        whole: the conversation.
        part: its beginning.
    """
    if not part:
        return whole
    n = len(part) - 1
    if whole[:n] != part[:n] or n >= len(whole):
        return None
    ours, theirs = whole[n], part[n]
    if ours == theirs:
        return whole[n + 1 :]
    if isinstance(ours, str) and isinstance(theirs, str) and ours.startswith(theirs):
        return [ours[len(theirs) :], *whole[n + 1 :]]
    return None


def _start(template: ChatTemplate, tokenizer: Tokenizer) -> Pieces:
    """Return what comes before a conversation that the assistant begins."""
    return [] if template.own else list(tokenizer.prefix)


def _single(before: Pieces, upto: Pieces, message: Mapping[str, Any], ends: Ends) -> list[Span]:
    """Return one answer behind its prompt, as it stands there when the model writes it."""
    answer = after(upto, before)
    if answer is None:
        answer = [str(message.get("content") or ""), *ends.ids[:1]]
    return _ended([Span(before, False), Span(answer, True)], ends)


def _ended(whole: Sequence[Span], ends: Ends) -> list[Span]:
    """Return spans whose answers include what ends them, and nothing behind it."""
    cut: list[Span] = []
    rest: Pieces = []  # of the answer before, behind its end
    added = ""  # to it, where the next role's name is what ends it
    for pieces, trained in whole:
        if not trained:
            first = pieces[0] if pieces else ""
            if added and isinstance(first, str) and first.startswith(added):
                pieces = [first.removeprefix(added), *pieces[1:]]
            cut.append(Span(join([*rest, *pieces]), False))
            continue
        rest, added = [], ""
        last = next((i for i, piece in enumerate(pieces) if piece in ends.ids), None)
        if last is not None:
            pieces, rest = pieces[: last + 1], pieces[last + 1 :]
        elif ends.texts:
            added = _missing(pieces, ends.texts)
            pieces = [*pieces, added]
        else:
            pieces = [*pieces, *ends.ids[:1]]
        cut.append(Span(join(pieces), True))
    return [span for span in cut if span.pieces]


def _missing(pieces: Pieces, texts: Sequence[str]) -> str:
    """Return what an answer lacks to end with the first of some texts; nothing if it has one of them."""
    text = pieces[-1] if pieces and isinstance(pieces[-1], str) else ""
    if any(end in text for end in texts):
        return ""
    overlap = max(n for n in range(len(texts[0]) + 1) if text.endswith(texts[0][:n]))
    return texts[0][overlap:]
