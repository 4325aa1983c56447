"""Answers while clients listen: server-sent events, and noticing that nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from longscan.serve import answers
from longscan.serve.errors import ApiError, api_error
from longscan.serve.job import Job

__all__ = ["stream", "while_connected"]

T = TypeVar("T")
LOG = logging.getLogger("longscan.serve")

KEEP_ALIVE = 15.0  # seconds without an event, after which a stream shows that it lives
POLL = 0.25  # seconds between looks whether a client is still there
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Return the answer, or cancel it when the client has gone.

    Args:
        request: of the client.
        answer: to it.

    Raises:
        ApiError: it has gone.
    """
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([task], timeout=POLL))[0]:
            if await request.is_disconnected():
                raise ApiError(499, "the client has gone.")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class _Stream(StreamingResponse):
    """A stream that drops its jobs however it ends, also if it never begins."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], jobs: Sequence[Job]) -> None:
        super().__init__(_sse(chunks), media_type="text/event-stream", headers=HEADERS)
        self._jobs = jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()


def stream(chunks: AsyncIterator[dict[str, Any]], jobs: Sequence[Job]) -> Response:
    """Return chunks as server-sent events.

    Args:
        chunks: of the answer.
        jobs: that it reads.
    """
    return _Stream(chunks, jobs)


async def _sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield the bytes of a stream; an error is its last event."""
    waiting: asyncio.Task[dict[str, Any]] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            if not (await asyncio.wait([waiting], timeout=KEEP_ALIVE))[0]:
                yield b": keep-alive\n\n"
                continue
            chunk, waiting = waiting.result(), None
            yield answers.sse(chunk)
    except StopAsyncIteration:
        yield answers.DONE
    except Exception as error:
        found = api_error(error)
        if found.status >= 500:
            LOG.exception("an answer failed")
        yield answers.sse(answers.error(str(found), found.kind, found.code, found.param))
    finally:
        if waiting is not None:
            waiting.cancel()  # if it is done already, its result or exception still has to be taken
            with contextlib.suppress(BaseException):
                await waiting
        close: Callable[[], Awaitable[None]] | None = getattr(chunks, "aclose", None)
        if close is not None:
            await close()
