"""A request while the engine works on it, and reading what it writes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longscan.errors import LongscanError
from longscan.inference.grammar import GrammarError
from longscan.inference.request import Request
from longscan.inference.sampling import Event, Finish
from longscan.models.common.state import SavedState
from longscan.serve.constraints import Rules
from longscan.serve.errors import ApiError
from longscan.tokenizers.chat import Pieces

__all__ = ["ChatJob", "Job", "Piece", "Text", "merged"]

MAX_BACKLOG = 4096  # events that a client has not read yet; beyond, its texts end


@dataclass
class Text:
    """One continuation so far.

    Attributes:
        ids: of its tokens.
        text: what was shown.
        finish: why it ended; None while it runs.
        saved: the state after it, if the request asked for it.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    saved: SavedState | None = None


class Job:
    """A request on its way, with one or several continuations.

    Args:
        request: what to generate.
        n: continuations.
        cancel: drops it from the engine.

    Attributes:
        texts: the continuations so far.
        failed: what went wrong with the engine, if anything did.
    """

    def __init__(self, request: Request, n: int, cancel: Callable[[Job], None]) -> None:
        self.texts = [Text() for _ in range(n)]
        self.failed: BaseException | None = None
        self.request, self.tokens, self._cancel = request, len(request.ids), cancel
        self._events: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.begun = False  # it has a token
        self.ended = False  # the engine knows it no longer
        self.cut = False  # it was ended early: by `end`

    async def events(self, deadline: float | None = None) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all continuations, each with its index, until they have ended.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            TimeoutError: the deadline has passed before the first token; later, the texts just end.
            LongscanError: the engine failed.
        """
        while True:
            while self._events:
                index, event = self._events.popleft()
                text = self.texts[index]
                if event.token >= 0:
                    text.ids.append(event.token)
                text.text += event.text
                text.finish = event.finish
                yield index, event
            if self.failed is not None:
                raise LongscanError(f"the engine failed: {self.failed}") from self.failed
            if all(text.finish for text in self.texts):
                return
            if self.cut:
                for index, text in enumerate(self.texts):
                    if text.finish is None:
                        text.finish = "length"
                        yield index, Event(index, -1, "", "length")
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self._arrived.wait()
            except TimeoutError:
                if not any(text.ids for text in self.texts):
                    raise
                self.end()  # what there is is an answer

    def deliver(self, events: list[tuple[int, Event]]) -> None:
        """Append events; called on the event loop.

        Args:
            events: with the index of their continuation.
        """
        self._events.extend(events)
        if len(self._events) > MAX_BACKLOG:  # a slow reader: nobody shall hold its text for it
            self.end()
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """Let the reader raise; called on the event loop.

        Args:
            error: of the engine.
        """
        self.failed = error
        self._arrived.set()

    def end(self) -> None:
        """End all continuations now, as if they had reached their length."""
        self.cut = True
        self.cancel()
        self._arrived.set()

    def cancel(self) -> None:
        """Drop what is not done; without effect afterwards."""
        self._cancel(self)


@dataclass
class ChatJob:
    """A chat on its way.

    Attributes:
        job: its continuations.
        prompt: what is answered.
        n_prompt: its tokens.
        cached: those that a state held already.
        rules: what its texts follow.
    """

    job: Job
    prompt: Pieces
    n_prompt: int
    cached: int
    rules: Rules


class Piece(NamedTuple):
    """An event of a continuation of a prompt.

    Attributes:
        choice: its index.
        event: the token.
    """

    choice: int
    event: Event


async def merged(jobs: Sequence[Job], deadline: float) -> AsyncIterator[Piece]:
    """Yield the events of several jobs as they come; what is left is cancelled when the iterator closes.

    Args:
        jobs: with as many continuations each.
        deadline: on the clock of `time.monotonic`.

    Raises:
        LongscanError: a continuation failed.
        TimeoutError: the deadline has passed before the first token.
    """
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def read(first: int, job: Job) -> None:
        try:
            async for index, event in job.events(deadline):
                queue.put_nowait(Piece(first + index, event))
                if queue.qsize() > MAX_BACKLOG:  # a slow reader: nobody shall hold its text for it
                    job.end()
            queue.put_nowait(None)
        except BaseException as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(i * len(job.texts), job)) for i, job in enumerate(jobs)]
    left = len(tasks)
    try:
        while left:
            piece = await queue.get()
            if piece is None:
                left -= 1
            elif isinstance(piece, BaseException):
                raise piece
            elif isinstance(piece.event.error, GrammarError):
                raise ApiError(400, str(piece.event.error), "invalid_value", "response_format")
            elif piece.event.error is not None:
                raise ApiError(500, f"a continuation failed: {piece.event.error}")
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        for job in jobs:
            job.cancel()
