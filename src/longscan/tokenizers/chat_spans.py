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
    most: int | None = None,
    **variables: Any,
) -> list[list[Span]]:
    """Return a conversation as spans; or, where a template rewrites what came before, one for each answer.

    An answer whose message has a `weight` of 0 is no answer to learn.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: each with a `role` and its `content`.
        ends: of the template.
        most: characters after which answers are no longer looked for; each takes a rendering of all before.
        variables: others that the template reads, such as `tools`.

    Raises:
        UsageError: there is no answer among them, or the template rejects them or does not write their calls.
        LongscanError: the template is at fault.
    """
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not any(messages[i].get("weight", 1) for i in answers):
        raise UsageError("messages: expected an answer of the assistant to learn, got none.")
    for i in answers:
        if not (messages[i].get("content") or "").strip() and not messages[i].get("tool_calls"):
            raise UsageError(f"messages[{i}].content: expected the assistant's answer, got an empty one.")
    plain = [{**message, "content": message.get("content") or ""} for message in messages]

    def render(some: Sequence[Mapping[str, Any]], prompt: bool = True) -> Pieces:
        if not some:
            return [] if template.own else list(tokenizer.prefix)
        return template.render(tokenizer, some, prompt=prompt, **variables)

    whole: list[Span] = []
    single: list[list[Span]] = []
    done: Pieces | None = []
    for i in answers:
        before, upto, learnt = (
            render(plain[:i]),
            render(plain[: i + 1], prompt=False),
            messages[i].get("weight", 1) > 0,
        )
        answer = after(upto, before)
        _check_calls(messages[i], upto if answer is None else answer, f"messages[{i}]")
        asked = None if done is None or answer is None else after(before, done)
        if asked is None or answer is None:
            done = None  # it rewrites
        else:
            whole += [Span(asked, False), Span(answer, learnt)]
            done = upto
        if learnt:
            single.append(_single(before, answer, plain[i], ends))
        if most is not None and sum(len(piece) for piece in upto if isinstance(piece, str)) > most:
            break
    return single if done is None else [_ended(whole, ends)]


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


def _check_calls(message: Mapping[str, Any], written: Pieces, where: str) -> None:
    """Raise unless a template writes the calls of a message."""
    text = "".join(piece for piece in written if isinstance(piece, str))
    for call in message.get("tool_calls") or ():
        name = call["function"]["name"]
        if name not in text:
            raise UsageError(
                f"{where}.tool_calls: the chat template does not write the call of {name!r}. Use one for "
                "tools, with --template."
            )


def _single(before: Pieces, answer: Pieces | None, message: Mapping[str, Any], ends: Ends) -> list[Span]:
    """Return one answer behind its prompt, as it stands there when the model writes it."""
    if answer is None:
        answer = [message["content"], *ends.ids[:1]]
    return _ended([Span(before, False), Span(answer, True)], ends)


def _ended(whole: Sequence[Span], ends: Ends) -> list[Span]:
    """Return spans whose answers include what ends them, and nothing behind it."""
    cut: list[Span] = []
    rest: Pieces = []  # of the answer before, behind its end
    added = ""  # to it, where the next role's name is what ends it
    for number, (pieces, trained) in enumerate(whole):
        if number % 2 == 0:  # not an answer
            if added:
                pieces = [str(pieces[0]).removeprefix(added), *pieces[1:]]
            cut.append(Span(join([*rest, *pieces]), False))
            continue
        rest, added = [], ""
        last = next((i for i, piece in enumerate(pieces) if piece in ends.ids), None)
        if last is not None:
            pieces, rest = pieces[: last + 1], pieces[last + 1 :]
        elif ends.texts:
            added = _missing(pieces, ends.texts)
            if number + 1 < len(whole) and not _begins(whole[number + 1].pieces, added):
                added = ""  # another role speaks: what would end it here is not written
            pieces = [*pieces, added]
        elif trained:
            pieces = [*pieces, *ends.ids[:1]]
        cut.append(Span(join(pieces), trained))
    return [span for span in cut if span.pieces]


def _begins(pieces: Pieces, text: str) -> bool:
    """Whether pieces begin with a text."""
    return bool(pieces) and isinstance(pieces[0], str) and pieces[0].startswith(text)


def _missing(pieces: Pieces, texts: Sequence[str]) -> str:
    """Return what an answer lacks to end with the first of some texts; nothing if it has one of them."""
    text = pieces[-1] if pieces and isinstance(pieces[-1], str) else ""
    if any(end in text for end in texts):
        return ""
    overlap = max(n for n in range(len(texts[0]) + 1) if text.endswith(texts[0][:n]))
    return texts[0][overlap:]
