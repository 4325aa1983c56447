"""Conversations: messages, and the states of a model after some of them.

A turn costs its new tokens. The state after an answer already holds the conversation; the next prompt is
rendered as a whole, and only what follows the part that a state has seen is prefilled. A state holds the ids
that were written, and by decoding steps, not by a prefill, which is equal up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import LongscanError, UsageError
from longscan.inference.chat_file import load_chat, save_chat
from longscan.inference.engine import Engine
from longscan.inference.prefill import Progress, read
from longscan.inference.request import Request
from longscan.inference.sampling import Finish, SamplingConfig, check_fit
from longscan.inference.turns import Known, Turns, answered, encode_pieces
from longscan.models import LanguageModel
from longscan.models.common.state import SavedState
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import ChatTemplate, Pieces, find_template
from longscan.tokenizers.chat_spans import after

__all__ = ["Conversation", "Turn"]

BUDGET = 256 << 20  # bytes of states
ANSWERING = "an answer is being written: finish it first, or close its iterator."
DEFAULT = SamplingConfig(max_new_tokens=512, temperature=0.7, top_p=0.9)


@dataclass
class Turn:
    """What an answer took.

    Attributes:
        read: tokens that were prefilled.
        remembered: tokens before them that a state held already.
        written: tokens of the answer.
        finish: why it ended; None if it was stopped.
        first: seconds until its first token.
        seconds: from the first token to the last.
    """

    read: int = 0
    remembered: int = 0
    written: int = 0
    finish: Finish | None = None
    first: float = 0.0
    seconds: float = 0.0


@dataclass
class _Written:
    """An answer so far, and the number of tokens before it."""

    begin: int
    ids: list[int] = field(default_factory=list)
    text: str = ""


class Conversation:
    """A conversation with a language model.

    Args:
        model: any causal model.
        tokenizer: the one it was trained with.
        template: how it wants to be talked to, or its name, see `find_template`; None for the tokenizer's
            own, or a plain one if it has none.
        config: the sampling settings; answer i uses seed + i.
        system: the message that comes first.
        variables: others that the template reads.
        progress: called while messages are prefilled.

    Attributes:
        messages: so far, each with `role` and `content`.
        turn: what the last answer took.
        progress: called while messages are prefilled.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | str | None = None,
        *,
        config: SamplingConfig | None = None,
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._asked, self._answering = config or DEFAULT, False
        self.switch(model, tokenizer, template)
        self.messages: list[dict[str, Any]] = []
        self.turn = Turn()
        self._variables, self.progress = dict(variables or {}), progress
        self._retries = 0
        if system is not None:
            self.system(system)

    def switch(
        self, model: LanguageModel, tokenizer: Tokenizer, template: ChatTemplate | str | None = None
    ) -> None:
        """Let another model answer from now on; the messages stay, and are prefilled anew.

        Args:
            model: any causal model.
            tokenizer: the one it was trained with.
            template: see `Conversation`.

        Raises:
            UsageError: there is no such template, or an answer is being written.
            LongscanError: the tokenizer is not for this model.
        """
        if self._answering:
            raise UsageError(ANSWERING)
        check_fit(model, tokenizer)
        found = template if isinstance(template, ChatTemplate) else find_template(tokenizer, template)
        self.model, self.tokenizer = model, tokenizer
        self.template: ChatTemplate = found
        self._ends, stops = found.ends(tokenizer)
        self._config = replace(self._asked, stop=(*self._asked.stop, *stops))
        self._turns = Turns(model, BUDGET, least=2)

    def system(self, text: str) -> None:
        """Replace the system message; the rest stays, and is prefilled anew.

        Args:
            text: of the message; "" removes it.
        """
        rest = [message for message in self.messages if message["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def say(self, text: str) -> Generator[str, None, None]:
        """Append a message and yield the answer, piece by piece; what it took is in `turn` afterwards.

        If the iterator is closed early, the answer ends there and stays part of the conversation.

        Args:
            text: of the user's message.

        Raises:
            UsageError: the template rejects the messages.
            LongscanError: the model's logits are invalid, or the template is at fault.
        """
        yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Generator[str, None, None]:
        """Replace the last answer by another one; see `say`.

        Raises:
            UsageError: there is none.
        """
        asked = self._before_answer()
        if asked is None:
            raise UsageError("there is no answer yet: nothing to repeat.")
        self._retries += 1
        yield from self._answer(self.messages[:asked])

    def undo(self) -> bool:
        """Remove the last message of the user and the answer; return whether there was one."""
        asked = self._before_answer()
        if asked is None:
            return False
        self.messages = self.messages[: asked - 1]
        return True

    @property
    def position(self) -> int:
        """The tokens of this conversation that a state holds."""
        return self._current().length

    @property
    def nbytes(self) -> int:
        """The size of that state in bytes."""
        return self._current().saved.state.used().nbytes

    def _current(self) -> Known:
        """Return the state that holds the most of the messages."""
        if not self.messages:
            return self._turns.nothing()
        try:
            return self._turns.best(self._render(self.messages, prompt=False))
        except LongscanError:  # the template is for questions only
            return self._turns.nothing()

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, and beside them the last state, which spares prefilling them again.

        Args:
            path: of the JSON file; the state is in PATH.state.

        Raises:
            OSError: a file cannot be written.
        """
        known = self._current()
        save_chat(Path(path), self.messages, known if known.pieces else None, self.model)

    def load(self, path: str | Path) -> bool:
        """Replace the conversation by a saved one.

        Args:
            path: what `save` wrote, or a JSON file with `messages` alone.

        Returns:
            Whether its state was of use; if not, the next turn prefills all messages.

        Raises:
            LongscanError: the file holds no messages.
            OSError: it cannot be read.
        """
        self.messages, known = load_chat(Path(path), self.model)
        self._turns.clear()
        if known:
            self._turns.store(known)
        return known is not None

    def _before_answer(self) -> int | None:
        """Return the number of messages up to the last one of the user."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return asked[-1] + 1 if asked else None

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        """Yield the answer to messages, which replace those of the conversation."""
        if self._answering:
            raise UsageError(ANSWERING)
        self._answering = True
        try:
            yield from self._write(messages)
        finally:
            self._answering = False

    def _write(self, messages: list[dict[str, Any]]) -> Generator[str, None, None]:
        """Do the work of `_answer`."""
        begin = time.perf_counter()
        question = self._render(messages, prompt=False)
        prompt = self._render(messages, prompt=True)
        turn = Turn()
        before = self._prefilled(question, prompt, turn)
        rest = self._encode(after(prompt, before.pieces) or [])
        if not len(rest) and not before.saved.pending:
            raise LongscanError(f"the chat template {self.template.name!r} renders nothing to answer.")
        turn.read += len(rest)
        answers = sum(message["role"] == "assistant" for message in messages) + self._retries
        seed = None if self._config.seed is None else (self._config.seed + answers) % 2**64
        config = replace(self._config, seed=seed)
        engine = Engine(self.model, self.tokenizer, slots=1, progress=self.progress)
        state, position, pending = before.saved
        number = engine.submit(
            Request(
                ids=rest,
                config=config,
                eos_id=self._ends,
                state=state if position else None,
                position=position,
                pending=pending,
                keep=True,
                before_stop=True,
            )
        )
        previous, self.messages = self.messages, messages
        self.turn = turn
        written, last = _Written(before.length + len(rest)), begin
        try:
            for event in engine.run():
                if event.error is not None:
                    raise event.error
                last = time.perf_counter()
                turn.first = turn.first or last - begin
                written.ids.append(event.token)
                written.text += event.text
                turn.finish = event.finish
                yield event.text
            self._keep(prompt, written, engine.saved(number), ended=turn.finish == "eos")
        except GeneratorExit:
            self._keep(prompt, written, engine.saved(number))
            raise
        finally:
            turn.written, turn.seconds = len(written.ids), last - begin - turn.first
            answer = {"role": "assistant", "content": written.text}
            if self.messages is messages:  # nobody has changed them meanwhile
                self.messages = [*messages, answer] if written.ids else previous

    def _render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool) -> Pieces:
        """Return the pieces of messages."""
        return self.template.render(self.tokenizer, messages, prompt=prompt, **self._variables)

    def _prefilled(self, question: Pieces, prompt: Pieces, turn: Turn) -> Known:
        """Return a state that holds the messages up to the prompt of the answer, or as much as there is.

        It is stored, so that another answer, or another question, can begin there.
        """
        border = question if after(prompt, question) else None  # if there is something to prefill behind it
        best = self._turns.best(border or prompt)
        turn.remembered = best.length
        if border is None:
            return best
        new = self._encode(after(border, best.pieces) or [])
        if not len(new):
            return best
        ids = np.concatenate([np.array(best.saved.pending, np.int64), new])
        start = best.saved.position
        _, state = read(self.model, ids, best.saved.state if start else None, start, progress=self.progress)
        turn.read += len(new)
        found = Known(border, SavedState(state, start + len(ids), []))
        self._turns.store(found)
        return found

    def _keep(self, prompt: Pieces, written: _Written, saved: SavedState, ended: bool = False) -> None:
        """Store the state after an answer, if it holds what the answer's text says and nothing else."""
        ids = written.ids[: saved.position + len(saved.pending) - written.begin]
        known = answered(self.tokenizer, prompt, ids, written.text, saved, ended)
        if known:
            self._turns.store(known)

    def _encode(self, pieces: Pieces) -> np.ndarray:
        """Return the ids of pieces (n,)."""
        return encode_pieces(self.tokenizer, pieces)
